# flash_entmax_warnings(TARGET): the warnings that this project's own code must not raise.
function(flash_entmax_warnings target)
  target_compile_options(${target} PRIVATE
    -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wcast-align -Wunused -Woverloaded-virtual
    -Wnull-dereference -Wdouble-promotion -Wformat=2 -Wimplicit-fallthrough
    $<$<BOOL:${FLASH_ENTMAX_WERROR}>:-Werror>
    # GCC 12 and 13 see overlaps in "text" + std::to_string(x) that are not there (GCC bug 105651).
    $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)
endfunction()
