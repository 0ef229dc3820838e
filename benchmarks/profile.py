"""Where does the time of a training step go?

    python benchmarks/profile.py [--model vit_base] [--device cpu] [--precision bf16] [--batch 8] [--compile] [--trace FILE]

Prints the time that kinds of work take (on a GPU by its own clock, else on the CPU), and the operations that take most of it. `--trace`
keeps it all for chrome://tracing.
"""

import sys

if __name__ == "__main__":
    from breakdown import main

    sys.exit(main())
else:  # cProfile asks for the standard library's module of this name, and this folder may come first on the path
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location(__name__, f"{sysconfig.get_path('stdlib')}/profile.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
