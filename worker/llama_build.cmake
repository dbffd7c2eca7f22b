# Read right after llama.cpp's own project(), by CMAKE_PROJECT_llama.cpp_INCLUDE.

# libllama-common is a third of the build, and Python uses none of it. The package turns it on by
# force, so an option cannot turn it off.
set(LLAMA_BUILD_COMMON OFF)

# GGML_NATIVE uses all that this processor can do, and ggml's kernels for AMX tiles crash
# (ggml-org/llama.cpp#20824). There is no option for leaving out just these.
include(CheckCXXCompilerFlag)
foreach(tile amx-tile amx-int8 amx-bf16)
    string(MAKE_C_IDENTIFIER "has_${tile}" known)
    check_cxx_compiler_flag("-m${tile}" ${known})
    if(${known})
        add_compile_options("-mno-${tile}")
    endif()
endforeach()
