"""Our methods and kernels inside other merging libraries. None of those is needed; each has a module of its own."""
