# Installs the library, its headers and the CMake package, so that others can
# find_package(flash_entmax) and link flash_entmax::flash_entmax.
include(CMakePackageConfigHelpers)

install(TARGETS flash_entmax EXPORT flash_entmax_targets
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/flash_entmax
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(FLASH_ENTMAX_BUILD_TOOLS)
  install(TARGETS flash-entmax RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_entmax)
install(EXPORT flash_entmax_targets FILE flash_entmax_targets.cmake NAMESPACE flash_entmax::
        DESTINATION ${package_dir})
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/flash_entmax-config.cmake.in
  ${PROJECT_BINARY_DIR}/flash_entmax-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flash_entmax-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flash_entmax-config.cmake
              ${PROJECT_BINARY_DIR}/flash_entmax-config-version.cmake
        DESTINATION ${package_dir})
