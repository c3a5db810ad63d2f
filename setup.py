from setuptools import Extension, setup

CODE = "kernels/paced_kernels/_tree/host_code"

setup(  # everything else is declared in pyproject.toml
    ext_modules=[
        Extension(
            "paced_kernels._tree._host",
            [f"{CODE}/module.c"],
            depends=[f"{CODE}/{name}.h" for name in ("arithmetic", "sums", "writes", "draws", "race")],
            # A product fused into a sum is rounded once instead of twice, and weights would have other bits. Nothing
            # asks for errno or for exceptions of arithmetic.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a compiler the tree is plain PyTorch
        )
    ]
)
