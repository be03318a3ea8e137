#!/usr/bin/env python3
"""Does Hugging Face's `transformers` read our GPT-2 checkpoint, and compute what train_gpt computes from it?

  test_transformers.py CHECKPOINT_DIR LOGITS_JSON        (run through test_transformers.sh, which finds a Python for it)

CHECKPOINT_DIR holds config.json and model.safetensors. LOGITS_JSON is what train_gpt computed from that checkpoint:

  {"tokens": [[...T ids], ...],      B rows of token ids
   "logits": [[...V floats], ...],   B rows: the logits of each row's last position
   "loss": 4.92}                     mean over the B*(T-1) tokens that follow another one in their row, in nats

transformers computes in float64 from the file's float32 weights, so that the difference is our rounding alone.
Exit status: 0 agreement, 1 a difference (named), 2 bad usage, 77 skipped because torch or transformers is missing.
"""
import json
import os
import sys

LOGITS_TOLERANCE = 2e-5  # largest absolute difference over largest absolute logit
LOSS_TOLERANCE = 1e-5    # relative

os.environ["HF_HUB_OFFLINE"] = "1"         # everything is in the folder
os.environ["TRANSFORMERS_OFFLINE"] = "1"   # the same for versions that know only this name


def bare(name):
    """'transformer.h.0.ln_1.weight' and 'h.0.ln_1.weight' are the same tensor to transformers."""
    return name[len("transformer."):] if name.startswith("transformer.") else name


def check_names(folder, model, info, problems):
    """Every tensor of the model comes from the file, and every tensor of the file goes into the model, unchanged."""
    import torch
    from safetensors.torch import load_file

    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            problems.append(f"from_pretrained reports {kind}: {sorted(map(str, info[kind]))}")
    # from_pretrained forgives some names in silence (buffers of old versions, ...), so they are also compared here.
    stored = {bare(name): tensor for name, tensor in load_file(os.path.join(folder, "model.safetensors")).items()}
    wanted = {bare(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)  # the same storage as wte.weight
    for name in sorted(wanted.keys() - stored.keys()):
        problems.append(f"tensor {name} of the model is not in the file")
    for name in sorted(stored.keys() - wanted.keys()):
        problems.append(f"tensor {name} of the file is not in the model")
    for name in sorted(stored.keys() & wanted.keys()):
        if not torch.equal(stored[name], wanted[name]):
            problems.append(f"tensor {name} changed while it was loaded")
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    if tied != model.config.tie_word_embeddings:
        problems.append("the head is tied to the token embedding, or not, against config.json")
    if tied != ("lm_head.weight" not in stored):
        problems.append("config.json ties the head, or does not, against the tensors of the file")


def check_numbers(model, ours, problems):
    """Logits of the last positions and the mean next-token loss, against float64."""
    import torch

    tokens = torch.tensor(ours["tokens"])
    model.double().eval()
    with torch.no_grad():
        logits = model(tokens).logits
    theirs, mine = logits[:, -1, :], torch.tensor(ours["logits"], dtype=torch.float64)
    if mine.shape != theirs.shape:
        problems.append(f"logits: train_gpt wrote {tuple(mine.shape)}, transformers has {tuple(theirs.shape)}")
        return
    difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    loss_difference = abs(ours["loss"] - loss) / abs(loss)
    # Written as "not below", so that a NaN is a difference.
    if not difference < LOGITS_TOLERANCE:
        problems.append(f"logits differ by {difference:.2e} of the largest logit, allowed {LOGITS_TOLERANCE:.0e}")
    if not loss_difference < LOSS_TOLERANCE:
        problems.append(f"loss {ours['loss']:.8g} from train_gpt, {loss:.8g} from transformers: they differ by "
                        f"{loss_difference:.2e}, allowed {LOSS_TOLERANCE:.0e}")
    print(f"logits of {tokens.shape[0]} rows of {tokens.shape[1]} tokens differ by {difference:.2e} of the largest, "
          f"the loss by {loss_difference:.2e}")


def main():
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    folder, logits_path = sys.argv[1:]
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"SKIPPED: {sys.executable} has no torch or no transformers ({error})")
        return 77
    transformers.logging.set_verbosity_error()
    for path in (os.path.join(folder, "config.json"), os.path.join(folder, "model.safetensors"), logits_path):
        if not os.path.isfile(path):
            print(f"FAILED: {path} does not exist")
            return 1
    with open(logits_path) as file:
        ours = json.load(file)

    problems = []
    try:
        model, info = transformers.GPT2LMHeadModel.from_pretrained(
            folder, output_loading_info=True, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; each means that it cannot read our folder
        print(f"FAILED: transformers {transformers.__version__} cannot load {folder}: {type(error).__name__}: {error}")
        return 1
    check_names(folder, model, info, problems)
    check_numbers(model, ours, problems)
    for problem in problems:
        print(f"FAILED: {problem}")
    if not problems:
        print(f"passed: transformers {transformers.__version__} on torch {torch.__version__} agrees with {folder}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
