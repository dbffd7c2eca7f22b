# libllama-common is a third of the build, and Python uses none of it. The package turns it on by
# force, so an option cannot turn it off: this file is read after that, by
# CMAKE_PROJECT_llama.cpp_INCLUDE.
set(LLAMA_BUILD_COMMON OFF)
