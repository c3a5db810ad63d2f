from setuptools import Extension, setup

PACKAGE = "kernels/paced_kernels"

setup(  # everything else is declared in pyproject.toml
    ext_modules=[
        Extension(
            f"{package}._host",
            [f"{folder}/host_code/module.c"],
            depends=[f"{folder}/host_code/{name}.h" for name in headers],
            # A product fused into a sum is rounded once instead of twice, and the tree's weights would have other bits.
            # Nothing asks for errno or for exceptions of arithmetic.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a compiler both are plain PyTorch
        )
        for package, folder, headers in (
            ("paced_kernels", PACKAGE, ("pack", "product")),
            ("paced_kernels._tree", f"{PACKAGE}/_tree", ("arithmetic", "sums", "writes", "draws", "race")),
        )
    ]
)
