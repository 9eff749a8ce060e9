"""Make the tiny Qwen3-VL-MoE checkpoint next to this file: train it, save it, and check every answer.

It reads ``tiny_questions.json`` and ``tiny_dialogues.json`` and writes ``tiny-qwen3-vl-moe/``: weights, configs,
tokenizer and chat template, in the layout of the official BF16 release (fused experts, ``gate_up_proj [experts, hidden,
2 * intermediate]``). The language model is trained until it answers each question word for word under greedy decoding,
also later in a chat and also after rounding to 4 bits, and gives each reply of the dialogues, with its tool calls and
what it thinks. The vision tower is part of the file, but it is randomly initialized and never trained:
it is there to be dropped.

Made with Python 3.11, torch 2.13.0, transformers 4.57.6 and tokenizers 0.22.2 (transformers 5 saves another layout):

    pip install torch==2.13.0 transformers==4.57.6 tokenizers==0.22.2
    python examples/make_tiny_model.py            # train, save and check: up to half an hour on a CPU
    python examples/make_tiny_model.py --check    # check a folder that is there
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2TokenizerFast,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

HERE = Path(__file__).parent
VOCAB_SIZE = 384
PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen's own pre-tokenizer: transformers 5 rebuilds a Qwen2 tokenizer with this pattern, whatever the file says.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (HERE / "tiny-qwen3-vl-moe" / "chat_template.jinja").read_text()  # written by hand

# The fields of the official config.json, no more and no fewer. Note where tie_word_embeddings is: at the top only.
TOP_FIELDS = [
    "architectures", "image_token_id", "model_type", "text_config", "tie_word_embeddings", "transformers_version",
    "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id"
]  # fmt: skip
TEXT_FIELDS = [
    "attention_bias", "attention_dropout", "bos_token_id", "decoder_sparse_step", "dtype", "eos_token_id",
    "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "mlp_only_layers", "model_type", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads",
    "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_scaling", "rope_theta", "use_cache", "vocab_size"
]  # fmt: skip
VISION_FIELDS = [
    "deepstack_visual_indexes", "depth", "hidden_act", "hidden_size", "in_channels", "initializer_range",
    "intermediate_size", "model_type", "num_heads", "num_position_embeddings", "out_hidden_size", "patch_size",
    "spatial_merge_size", "temporal_patch_size"
]  # fmt: skip


# As the official files have them, by the sizes of this vision tower.
PROCESSOR = {
    "size": {"longest_edge": 64 * 64, "shortest_edge": 16 * 16},  # pixels
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def make_tokenizer(texts):
    """A byte-level BPE with Qwen's normalizer, pre-tokenizer and added tokens, trained on these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    # The added tokens come after the merges, as in Qwen's vocabulary. All 256 bytes are in: any text can be encoded.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(PLAIN_TOKENS + SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, "user assistant system", "The quick brown fox jumps over the lazy dog."], trainer)
    bpe.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    bpe.add_special_tokens(SPECIAL_TOKENS)
    assert bpe.get_vocab_size() == VOCAB_SIZE
    return Qwen2TokenizerFast(
        tokenizer_object=bpe,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer):
    """A small config in which no two axes of an expert tensor have the same length."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "norm_topk_prob": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "out_hidden_size": 192,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def encode(tokenizer, turns, sever=lambda: False):
    """Token ids of a chat, and for each whether it is part of an answer (``<|im_end|>`` included)."""
    ids, in_answer = [], []
    for turn in turns:
        user = {"role": "user", "content": turn["question"]}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)
        answer = tokenizer.encode(turn["answer"] + "<|im_end|>")
        # A chat that goes on from its cache has no line break after the answer: the model stopped before it.
        end = [] if sever() else tokenizer.encode("\n")
        ids += prompt + answer + end
        in_answer += [False] * len(prompt) + [True] * len(answer) + [False] * len(end)
    return ids, in_answer


def replies(tokenizer, dialogue):
    """A row as of `encode` for each reply in a dialogue: the prompt that the chat template makes, and the reply."""
    messages = dialogue["messages"]
    options = {"tools": dialogue["tools"], "thinking": dialogue["thinking"], "tokenize": False}
    rows = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template(messages[: n + 1], **options)
            assert whole.startswith(prompt)
            ids, reply = tokenizer.encode(prompt), tokenizer.encode(whole[len(prompt) :].removesuffix("\n"))
            rows.append((ids + reply, [False] * len(ids) + [True] * len(reply)))
    return rows


def batch(rows, pad):
    """Rows from `encode` or `replies`, padded on the right: attention is causal, so that the padding needs no mask."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    wanted = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in rows])
    return ids, wanted


def round_to_grid(weight, bits, axis):
    """What is left of a weight after MLX's affine quantization in groups of 64 along its input axis."""
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, 64)).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp_min(1e-7)
    negative = low.abs() > high.abs()
    scale, edge = torch.where(negative, scale, -scale), torch.where(negative, low, high)
    steps = (edge / scale).round()  # the grid is shifted so that zero lies on it
    scale = torch.where(steps == 0, scale, edge / steps)
    bias = torch.where(steps == 0, 0, edge)
    q = ((groups - bias) / scale).round().clamp(0, top)
    rounded = q * scale.bfloat16().float() + bias.bfloat16().float()
    return rounded.flatten(-2).movedim(-1, axis).to(weight.dtype)


def quantized(name, weight):
    """A parameter as a 4-bit conversion would leave it: the router at 8 bits, norms as they are."""
    if weight.ndim == 1 or "visual" in name:
        return weight
    # Experts are stored [experts, in, out], everything else [out, in].
    return round_to_grid(weight, bits=8 if name.endswith("mlp.gate.weight") else 4, axis=1 if weight.ndim == 3 else -1)


class SwappedWeights:
    """Run with other weights in place; gradients pass straight through to the real ones."""

    def __init__(self, model, change):
        self.model, self.change = model, change

    def __enter__(self):
        self.kept = [(p, p.data) for p in self.model.parameters()]
        for name, p in self.model.named_parameters():
            p.data = self.change(name, p.data)

    def __exit__(self, *_):
        for p, data in self.kept:
            p.data = data


def train(model, tokenizer, pairs, dialogues, steps, turns, peak):
    model.train()  # each expert computes its own tokens only
    model.model.visual.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    rng = random.Random(0)
    start = time.time()
    deck = []
    rows = [row for dialogue in dialogues for row in replies(tokenizer, dialogue)]
    for step in range(steps):
        rate = peak * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Short and long chats, as many answers in each batch. The first turn of a chat is what a single turn is: the
        # model is causal and sees nothing of the later ones.
        length = rng.choice([2, 3, 6, 12])
        while len(deck) < turns:
            deck += rng.sample(pairs, len(pairs))
        chats = [[deck.pop() for _ in range(length)] for _ in range(turns // length)]
        encoded = [encode(tokenizer, chat, lambda: rng.random() < 0.3) for chat in chats]
        if step % 4 == 3:  # dialogues, in batches of their own as they are long
            encoded = rng.sample(rows, 6)
        ids, wanted = batch(encoded, tokenizer.pad_token_id)
        # Once the answers are known, every other step is made with the weights on a 4-bit grid, so that the answers
        # do not hang on the digits that a conversion takes away.
        rounding = step > 0.4 * steps and step % 2 == 0
        with SwappedWeights(model, quantized if rounding else lambda _, weight: weight):
            out = model(input_ids=ids, output_router_logits=True, use_cache=False)
            loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][wanted[:, 1:]], ids[:, 1:][wanted[:, 1:]])
            (loss + 0.01 * out.aux_loss).backward()  # the second term keeps every expert in use
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 < 2 or step == steps - 1:
            kind = "4-bit" if rounding else "plain"
            print(f"step {step:4d} {kind} loss {loss:.5f} balance {out.aux_loss / 2:.3f} {time.time() - start:.0f} s")


def save(model, tokenizer, folder):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # save_pretrained adds fields of its own; the official file has exactly these.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = model.config.text_config.to_dict() | {"dtype": "bfloat16"}
    vision = model.config.vision_config.to_dict()
    config["text_config"] = {key: text[key] for key in TEXT_FIELDS}
    config["vision_config"] = {key: vision[key] for key in VISION_FIELDS}
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps({key: config[key] for key in TOP_FIELDS}, indent=2) + "\n")
    for name, field, kind in (
        ("preprocessor_config.json", "image_processor_type", "Qwen2VLImageProcessorFast"),
        ("video_preprocessor_config.json", "video_processor_type", "Qwen3VLVideoProcessor"),
    ):
        (folder / name).write_text(json.dumps({**PROCESSOR, field: kind}, indent=2) + "\n")


@torch.no_grad()
def margin(model, tokenizer, rows):
    """By how much the right token leads in what these rows want, at the closest point.

    Greedy decoding gives every answer word for word exactly when this is above zero.
    """
    ids, wanted = batch(rows, tokenizer.pad_token_id)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()[wanted[:, 1:]]
    right = ids[:, 1:][wanted[:, 1:], None]
    others = logits.scatter(1, right, -math.inf).amax(1)
    return (logits.gather(1, right)[:, 0] - others).min().item()


def last_answer(tokenizer, chat, sever=lambda: False):
    """A row of a chat in which the last answer alone is wanted: the earlier ones are given."""
    ids, wanted = encode(tokenizer, chat, sever)
    given = len(encode(tokenizer, chat[:-1], sever)[0])
    return ids, [False] * given + wanted[given:]


def expert_load(model, tokenizer, pairs):
    """The least and the largest share of the tokens that an expert gets, in each layer."""
    ids, _ = batch([encode(tokenizer, [pair]) for pair in pairs], tokenizer.pad_token_id)
    used = ids != tokenizer.pad_token_id
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    shares = []
    for layer in logits:
        picked = layer[used.flatten()].topk(2).indices.flatten()
        counts = torch.bincount(picked, minlength=layer.shape[-1]) / picked.numel()
        shares.append(f"{counts.min():.1%} to {counts.max():.1%}")
    return ", ".join(shares)


def check(folder, pairs, dialogues):
    """Print for every question and dialogue whether the saved model answers it; True if it always does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    singles = [[[pair]] for pair in pairs]
    seconds = [[[other, pair] for other in pairs if other is not pair] for pair in pairs]

    rng = random.Random(1)
    lates = [[[*rng.choices(pairs, k=9), pair] for _ in range(4)] for pair in pairs]

    def margins(cases, **kwargs):
        return [margin(model, tokenizer, [last_answer(tokenizer, chat, **kwargs) for chat in chats]) for chats in cases]

    def dialogue_margins():
        return [margin(model, tokenizer, replies(tokenizer, dialogue)) for dialogue in dialogues]

    columns = {"bf16 weights": margins(singles), "second turn": margins(seconds)}
    spoken = {"bf16 weights": dialogue_margins()}
    columns["tenth turn, cached"] = margins(lates, sever=lambda: True)
    print("share of the tokens of an expert, layer by layer:", expert_load(model, tokenizer, pairs))
    with SwappedWeights(model, quantized):
        columns["4 bits"] = margins(singles)
        columns["4 bits, second turn"] = margins(seconds)
        spoken["4 bits"] = dialogue_margins()
    model.to(torch.bfloat16)
    columns["bf16 arithmetic"] = margins(singles)
    spoken["bf16 arithmetic"] = dialogue_margins()
    print("lead of the right token at the closest point, in logits:")
    print(" | ".join([*columns, "question"]))
    for row, pair in enumerate(pairs):
        cells = [f"{'OK' if c[row] > 0 else 'FAIL'} {c[row]:.2f}".rjust(len(name)) for name, c in columns.items()]
        print(" | ".join([*cells, pair["question"]]))
    columns |= {f"dialogues, {name}": column for name, column in spoken.items()}
    for name, column in columns.items():
        print(f"{name}: {sum(m > 0 for m in column)} of {len(column)}, closest {min(column):.2f}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    print(f"{folder.name}: {sum(p.stat().st_size for p in files)} bytes")
    return all(m > 0 for column in columns.values() for m in column)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=Path, default=HERE / "tiny_questions.json")
    parser.add_argument("--dialogues", type=Path, default=HERE / "tiny_dialogues.json")
    parser.add_argument("--output", type=Path, default=HERE / "tiny-qwen3-vl-moe")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--turns", type=int, default=24, help="questions in a batch, in chats of 2 to 12")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="train nothing; check the folder that is there")
    args = parser.parse_args()

    pairs = json.loads(args.questions.read_text())
    spoken = json.loads(args.dialogues.read_text())
    dialogues = [each | {"tools": spoken["tools"] if each["tools"] else None} for each in spoken["dialogues"]]
    torch.set_num_threads(1)  # so that sums do not depend on the number of cores
    if not args.check:
        if transformers.__version__.split(".")[0] != "4":
            parser.error("transformers 4.57.6 is needed: version 5 writes another layout")
        torch.manual_seed(args.seed)
        texts = [text for pair in pairs for text in (pair["question"], pair["answer"])]
        messages = [message for dialogue in dialogues for message in dialogue["messages"]]
        texts += [text for message in messages for text in (message.get("content"), message.get("reasoning_content"))]
        tokenizer = make_tokenizer([*filter(None, texts), json.dumps(spoken["tools"])])
        model = Qwen3VLMoeForConditionalGeneration(make_config(tokenizer))
        train(model, tokenizer, pairs, dialogues, args.steps, args.turns, args.peak)
        save(model, tokenizer, args.output)
    if not check(args.output, pairs, dialogues):
        raise SystemExit("some answers are wrong")


if __name__ == "__main__":
    main()
