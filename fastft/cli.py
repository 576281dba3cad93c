"""The `fastft` command: train, predict, eval, merge, quantize and doctor.

A command imports what is heavy only after it has checked its arguments, so that help and typing errors are answered at
once. Exit codes: 0 when all was done, 2 for input that cannot be used, 1 for anything else that failed; `train` has more,
see fastft/guard.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from fastft import __version__
from fastft.arguments import Arguments, Parser, build_parser, nearest, parse_arguments
from fastft.launch import add_launcher_options, launch

COLUMNS = ("text_column", "text_pair_column", "label_column", "prompt_column", "completion_column")
RETOLD = (*COLUMNS, "max_length", "kernels")  # arguments of the training run that `predict` and `eval` may replace


def main(argv=None):
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"train": train, "predict": predict, "eval": evaluate, "merge": merge}
    commands |= {"quantize": quantize, "doctor": doctor}
    if argv and argv[0] in commands:
        return _run(f"fastft {argv[0]}", commands[argv[0]], argv[1:])
    parser = _parser("fastft", "Fine-tunes transformers.", epilog="`fastft COMMAND --help` lists its arguments.")
    parser.usage = "fastft [--help] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"fastft {__version__}")
    listed = parser.add_argument_group("commands")
    for name, command in commands.items():
        listed.add_argument(name, nargs="?", help=command.__doc__.splitlines()[0])
    if argv and not argv[0].startswith("-"):
        parser.error(f"unknown command {argv[0]}" + nearest(argv[0], commands))
    parser.parse_args(argv)
    parser.print_help()
    return 2


def train(argv):
    """Fine-tune a model on a file, with DeepSpeed's launcher; without either, a demonstration."""
    prog = "fastft train"
    parser = build_parser(prog)
    title = "launcher (DeepSpeed's; more of them through `deepspeed OPTIONS fastft/train.py ...`)"
    add_launcher_options(parser.add_argument_group(title))
    parser.parse_args(argv)  # answers --help and unknown names of either kind
    launcher = Parser(prog=prog, add_help=False, allow_abbrev=False)
    add_launcher_options(launcher)
    options, rest = launcher.parse_known_args(argv)
    parse_arguments(rest, prog)
    return launch(Path(__file__).with_name("train.py"), rest, vars(options))


def predict(argv):
    """Label the rows of a file, or write its answers, with a trained model."""
    parser = _parser("fastft predict", predict.__doc__)
    _add_model_and_file(parser)
    parser.add_argument("--output", metavar="FILE", help="JSONL file to write; by default the terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace that file where it exists")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, metavar="X", help="draw tokens at random, sharper below 1")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seeds these draws (default: 42)")
    args = parser.parse_args(argv)
    from fastft import predict as work

    options = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if args.temperature is not None:
        options |= {"temperature": args.temperature, "do_sample": True}
    work.predict(
        args.model,
        args.file,
        args.output,
        overwrite=args.overwrite,
        batch_size=args.batch_size,
        seed=args.seed,
        options=options,
        retold=_retold(args),
    )


def evaluate(argv):
    """Compute a trained model's metrics on a file."""
    parser = _parser("fastft eval", evaluate.__doc__)
    _add_model_and_file(parser)
    args = parser.parse_args(argv)
    from fastft import predict as work

    metrics = work.evaluate(args.model, args.file, batch_size=args.batch_size, retold=_retold(args))
    print(json.dumps({f"eval_{name}": value for name, value in metrics.items()}, indent=2))


def merge(argv):
    """Merge an adapter into its base model."""
    parser = _parser("fastft merge", merge.__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the adapter")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new or empty folder for the whole model")
    parser.add_argument("--base_model", metavar="DIR", help="base model, where it is no longer where it was")
    args = parser.parse_args(argv)
    from fastft.export import merge as work

    errors = work(args.model, args.output_dir, args.base_model)
    print(f"The merged model is in {args.output_dir}")
    print(f"Rounding the merged weights changed them by {errors['rounding_error']:.2g} of their norm")
    if errors["quantization_error"] is not None:
        error = errors["quantization_error"]
        print(
            f"Its base is the one that was trained, read from 4 bits: {error:.2g} of the norm away from the whole weights"
        )
    print(f"Use it: fastft predict --model {args.output_dir} --file FILE")


def quantize(argv):
    """Write a model with its linear layers in 4 bits, as bitsandbytes does."""
    parser = _parser("fastft quantize", quantize.__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a whole model")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new or empty folder for the 4-bit model")
    args = parser.parse_args(argv)
    from fastft.export import quantize as work

    error = work(args.model, args.output_dir)
    print(f"The 4-bit model is in {args.output_dir}; its weights changed by {error:.2g} of their norm")
    print(f"Train on it: fastft train --model_name_or_path {args.output_dir} --use_peft true --train_file FILE")


def doctor(argv):
    """Say what works on this machine, what does not, and what to do."""
    _parser("fastft doctor", doctor.__doc__).parse_args(argv)
    from fastft.doctor import examine

    return examine()


def _run(prog, command, argv):
    """The exit code of a command; its errors become one sentence."""
    try:
        return command(argv) or 0
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{prog}: failed: {error}", file=sys.stderr)
    except RuntimeError as error:
        from fastft import BackendError

        if not isinstance(error, BackendError):
            raise
        print(f"{prog}: failed: {error}", file=sys.stderr)
    return 1


def _parser(prog, description=None, **options):
    formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110)
    return Parser(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False, **options)


def _add_model_and_file(parser):
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a trained model or adapter")
    parser.add_argument("--file", required=True, metavar="FILE", help="JSONL, JSON, CSV, TSV, Parquet or text file")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    group = parser.add_argument_group("instead of what the model was trained with")
    fields = {f.name: f for f in dataclasses.fields(Arguments)}
    for name in RETOLD:
        kind, metavar = (int, "N") if name == "max_length" else (str, "TEXT")
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=fields[name].metadata["help"])


def _retold(args):
    retold = {name: getattr(args, name) for name in RETOLD if getattr(args, name) is not None}
    return {**retold, "trust_remote_code": True} if args.trust_remote_code else retold
