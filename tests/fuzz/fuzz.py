"""Search for an input that breaks a target of targets.py, guided by coverage.

    pip install atheris==3.0.0
    python tests/fuzz/fuzz.py gguf -max_total_time=900

Arguments after the target are libFuzzer's. New inputs that reach new code are kept in
tests/fuzz/found/<target>, what breaks is written to crash-*: make it a case in tests/test_fuzz.py.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fuseweights"]):
    import fuseweights
    import fuseweights.api
    import fuseweights.layout
    import fuseweights.manifest
    import fuseweights.planner
    import fuseweights.unfuser
    import fuseweights.verifier  # noqa: F401

import targets

HERE = Path(__file__).parent


def main() -> None:
    name = sys.argv.pop(1)
    target = targets.TARGETS[name]
    found = HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.seeds()[name]):
        (found / f"seed-{number}").write_bytes(seed)
    bounds = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=16384", f"-artifact_prefix={found}/"]
    corpus = [str(found), *map(str, [HERE / "corpus" / name] * (HERE / "corpus" / name).is_dir())]
    atheris.Setup([sys.argv[0], *bounds, *sys.argv[1:], *corpus], lambda d: targets.run(target, d))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
