"""Our methods and kernels inside other merging libraries, one module for each. None of these libraries is required."""
