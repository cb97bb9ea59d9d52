"""Writes a model of a .gguf file as the folder of safetensors that vLLM reads.

    python examples/gguf_folder.py MODEL.gguf FOLDER

Weights become bfloat16, whatever the file quantised them to.
"""

import argparse
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    given = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **given, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(**given).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
