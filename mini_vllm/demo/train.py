"""Trains the bundled demo model: a small Qwen3 that tells fairy tales.

    pip install torch transformers
    python -m mini_vllm.demo.train --corpus fairy_tales.txt --out DIR

From a text file to a checkpoint that any engine loads: clean the text (corpus.py), learn a byte-level BPE
vocabulary, train a decoder to predict the next token, keep the weights that did best on stories it never saw.
The text is small (2.6 million tokens for 4.4 million weights) and is read many times, so the enemy is
memorising: dropout and weight decay work against it, and the held-out stories say when it sets in.
"""

import argparse
import copy
import json
import math
import re
import time
from pathlib import Path

from mini_vllm.demo.corpus import read_stories

try:
    import numpy as np
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
except ImportError as error:
    raise SystemExit(f"{error}. Training (and nothing else here) needs it: pip install torch transformers") from None

VOCAB_SIZE, CONTEXT = 2048, 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# How Qwen's tokenizers cut text into words before the BPE merges; "\n\n" is one piece, so one token.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What a story can be asked to be about, rare subjects first.
TOPICS = (
    "dragon mermaid giant dwarf witch wizard troll fox wolf bear lion cat dog horse bird fish fisherman tailor "
    "shoemaker miller soldier merchant shepherd hunter woodcutter peasant widow princess prince queen king boy girl man"
)


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def chat_text(story: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The story as the answer to a request for it, so that chat prompts are not foreign to the model."""
    opening = set(re.findall(r"\w+", story[:400].lower()))
    about = next((f" about a {topic}" for topic in TOPICS.split() if topic in opening), "")
    request = {"role": "user", "content": f"Tell me a story{about}."}
    return tokenizer.apply_chat_template([request, {"role": "assistant", "content": story}], tokenize=False)


class Windows:
    """All stories as one stream of tokens, and where to cut windows of CONTEXT tokens from it."""

    def __init__(self, stories: list[str], tokenizer: PreTrainedTokenizerFast):
        plain = tokenizer([story + tokenizer.eos_token for story in stories]).input_ids
        chats = tokenizer([chat_text(story, tokenizer) for story in stories]).input_ids
        ends = np.cumsum([len(ids) for ids in plain + chats])
        self.num_plain = ends[len(plain) - 1]
        self.story_starts = np.append(0, ends[:-1])
        tokens = np.concatenate(plain + chats)
        self.tokens = np.append(tokens, tokens[:CONTEXT])  # so that every start has a whole window after it
        breaks = np.isin(tokens[: self.num_plain], [tokenizer.eos_token_id, *tokenizer("\n\n").input_ids])
        self.paragraph_starts = np.append(0, np.flatnonzero(breaks) + 1)

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Returns shuffled starts that cover every story once, and some more beginnings of stories and of chats.

        The engine puts nothing before a prompt, so position 0 should have seen beginnings: of stories above
        all, and otherwise of paragraphs, never the middle of a word.
        """
        grid = np.arange(rng.integers(CONTEXT), self.num_plain, CONTEXT)
        grid = self.paragraph_starts[np.searchsorted(self.paragraph_starts, grid, side="right") - 1]
        openings = rng.choice(self.story_starts, len(grid) // 4)
        return rng.permutation(np.concatenate([grid, openings]))


def build_model(tokenizer: PreTrainedTokenizerFast, dropout: float) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=288,
        intermediate_size=832,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    # Qwen3 has no dropout of its own where it helps: after the embedding, and on what a sublayer adds to the stream.
    outputs = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in [model.model.embed_tokens, *outputs]:
        module.register_forward_hook(lambda m, _, out: torch.nn.functional.dropout(out, dropout, m.training))
    return model


@torch.no_grad()
def validation_loss(model: Qwen3ForCausalLM, batches: torch.Tensor) -> float:
    model.eval()
    with torch.autocast(batches.device.type, torch.bfloat16, enabled=batches.is_cuda):
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    stories = read_stories(args.corpus)
    held_out = stories[10::20]
    stories = [story for i, story in enumerate(stories) if i % 20 != 10]
    tokenizer = train_tokenizer(stories)
    windows = Windows(stories, tokenizer)
    tokens = torch.from_numpy(windows.tokens).to(args.device)
    held_out_ids = np.concatenate(tokenizer([story + tokenizer.eos_token for story in held_out]).input_ids)
    bits_per_byte = len(held_out_ids) / sum(len(story.encode()) for story in held_out) / math.log(2)
    per_batch = args.batch_size * CONTEXT
    if len(held_out_ids) < per_batch:
        raise SystemExit(
            f"{args.corpus} is too small: {len(held_out_ids)} tokens held out, one batch takes {per_batch}"
        )
    validation = torch.from_numpy(held_out_ids[: len(held_out_ids) // per_batch * per_batch])
    validation = validation.view(-1, args.batch_size, CONTEXT).to(args.device)

    model = build_model(tokenizer, args.dropout).to(args.device)
    print(
        f"{len(stories)} stories, {windows.num_plain} tokens to learn from; {len(held_out)} stories, "
        f"{len(held_out_ids)} tokens held out; {model.num_parameters()} parameters",
        flush=True,
    )
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.steps))),
    )
    forward = torch.compile(model) if args.compile else model

    best, best_weights, start, order = math.inf, {}, time.perf_counter(), np.array([], int)
    for step in range(1, args.steps + 1):
        if len(order) < args.batch_size:
            order = windows.epoch(rng)
        starts, order = np.split(order, [args.batch_size])
        batch = tokens[torch.from_numpy(starts).to(args.device)[:, None] + torch.arange(CONTEXT, device=args.device)]
        with torch.autocast(args.device, torch.bfloat16, enabled=tokens.is_cuda):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

        if step % args.eval_every == 0 or step == args.steps:
            held_out_loss = validation_loss(forward, validation)
            if held_out_loss < best:
                best, best_weights = held_out_loss, copy.deepcopy(model.state_dict())
            print(
                f"step {step}: loss {loss.item():.4f}, held out {held_out_loss:.4f} (best {best:.4f}, "
                f"{best * bits_per_byte:.4f} bits per byte), {time.perf_counter() - start:.1f} s",
                flush=True,
            )

    model.load_state_dict(best_weights)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=40,
        top_p=0.95,
        repetition_penalty=1.1,
        max_new_tokens=256,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    # transformers 5 writes names that 4 does not know, and reads those of 4.
    path = args.out / "tokenizer_config.json"
    names = json.loads(path.read_text())
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    names["additional_special_tokens"] = names.pop("extra_special_tokens")
    path.write_text(json.dumps(names, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="plain text, paragraphs separated by blank lines")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--eval-every", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    train(parser.parse_args())


if __name__ == "__main__":
    main()
