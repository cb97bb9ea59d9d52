"""The text that llama.cpp writes with the backend and without it, greedily.

    VATTN_TEST_GGUF=MODEL.gguf same_text.py BIN LIBRARY

BIN has llama-completion. Programs print other texts when two words are about as likely, already with another number of
threads; the prompt is a list that is said again and again, which leaves no doubt. Exit code 77 (skipped) without a model.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

WORDS = """harbour lantern orchard velvet compass meadow copper thistle anchor pebble saffron walnut glacier ribbon
cinder marble falcon bramble quarry willow ember cobalt juniper harvest tunnel mosaic violet canyon feather timber""".split()


def run(folder: pathlib.Path, program: str, library: str, model: str, settings: str | None) -> tuple[str, dict[str, int] | None]:
    stats = folder / "stats.json"
    stats.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_")}
    environment |= {"GGML_BACKEND_PATH": library, "GGML_VATTN_STATS": str(stats), "GGML_VATTN_MIN_TOKENS": "1600"}
    if settings is not None:
        environment["GGML_VATTN"] = settings
    done = subprocess.run(
        [program, "-m", model, "-f", str(folder / "prompt.txt"), "-c", "4096", "-n", "60", "--temp", "0", "-no-cnv",
         "-fa", "on", "-t", "2", "--no-warmup", "--no-display-prompt", "--simple-io"],
        env=environment, capture_output=True, text=True, check=True)
    return done.stdout, json.loads(stats.read_text().splitlines()[-1]) if stats.exists() else None


def main() -> int:
    model = os.environ.get("VATTN_TEST_GGUF", "")
    if not model:
        print("skipped: VATTN_TEST_GGUF names no model")
        return 77
    program, library = str(pathlib.Path(sys.argv[1]) / "llama-completion"), sys.argv[2]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        lines = "".join(f"{i + 1}. {word}\n" for i, word in enumerate(WORDS))
        (folder / "prompt.txt").write_text("The list:\n" + (lines + "The list again:\n") * 11)
        alone, none = run(folder, program, library, model, None)
        dense, dense_stats = run(folder, program, library, model, '{"policy": "dense"}')
        verified, stats = run(folder, program, library, model, "1")
    assert none is None, "the backend took part without being asked"
    assert "harbour" in alone, alone
    assert dense_stats and dense_stats["dense_calls"] > 0 and dense_stats["chunk_calls"] > 0, dense_stats
    assert stats and stats["verified_calls"] > 0 and stats["ggml_calls"] == 0, stats
    assert stats["rows_selected"] < stats["rows_middle"], stats
    assert dense == alone, f"with policy dense:\n{dense}\nalone:\n{alone}"
    assert verified == alone, f"with policy verified:\n{verified}\nalone:\n{alone}"
    print(f"60 tokens are the same; verified read {stats['rows_selected'] / stats['rows_middle']:.1%} of the middle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
