# See CMakeLists.txt.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "failed (${result}): ${ARGN}")
  endif()
endfunction()

set(prefix ${BUILD_DIR}/install-test/prefix)
set(examples ${BUILD_DIR}/install-test/examples)
file(REMOVE_RECURSE ${BUILD_DIR}/install-test)
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix})
set(toolchain)
if(TOOLCHAIN)
  set(toolchain -DCMAKE_TOOLCHAIN_FILE=${TOOLCHAIN} -DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=BOTH)
endif()
run(${CMAKE_COMMAND} -S ${SOURCE_DIR}/examples -B ${examples} -G ${GENERATOR}
    -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${FLAGS}
    ${toolchain})
run(${CMAKE_COMMAND} --build ${examples})
foreach(example sparse_attention classify)
  run(${EMULATOR} ${examples}/${example})
endforeach()
