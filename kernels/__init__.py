"""Triton kernels, installed as `fuseweights.kernels`. The converter needs none of them."""

if __name__ == "kernels":
    raise ImportError(
        "this is fuseweights' own folder, not the PyPI package `kernels`: "
        "import fuseweights.kernels, and keep the repository's root off sys.path"
    )
