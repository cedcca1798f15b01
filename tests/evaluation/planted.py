"""A hand-made recording with planted facts: 60 frames at 10 Hz, words of a and b, and what was said when."""

import json

import numpy as np

from ttt_jax.data.reader import TokenDataset
from ttt_jax.data.text import Word, load_tokenizer, text_stream, train_tokenizer
from ttt_jax.data.tokens import TokenInfo

RATE_HZ = 10.0
FRAMES = 60
INFO = TokenInfo("codec2", RATE_HZ, 8000, num_codebooks=2, card=20, text_card=20)
FACTS = [
    {"kind": "x", "owner": "main", "value": "aba", "held_out": False, "distractors": ["ba", "abbab"]},
    {"kind": "y", "owner": "other", "value": "ab ba", "held_out": True, "distractors": ["bab aabb", "a b"]},
    {"kind": "z", "owner": "main", "value": "b", "held_out": False, "distractors": ["a", "bb"]},
]
EVENTS = [  # fact, role, speaker, start, end
    (0, "mention", "main", 0.5, 0.9),
    (1, "mention", "other", 1.0, 1.6),
    (0, "question", "other", 2.0, 2.3),
    (0, "answer", "main", 2.5, 2.9),
    (1, "mention", "other", 3.0, 3.5),
    (1, "question", "other", 4.0, 4.2),
    (0, "question", "other", 4.25, 4.35),
    (1, "mention", "other", 4.4, 4.5),  # after its question: not what is recalled
    (0, "answer", "main", 4.6, 4.9),
    (1, "answer", "main", 5.2, 5.8),
    (2, "question", "other", 5.8, 5.85),
    (2, "answer", "main", 5.9, 6.0),  # of what was never mentioned
]
WORDS = [  # the main speaker's; the pieces of the second reach into the first answer
    Word("aba", 0.5, 0.9),
    Word("bbaab", 2.3, 2.5),
    Word("aba", 2.5, 2.9),
    Word("aba", 4.6, 4.9),
    Word("ab", 5.2, 5.4),
    Word("ba", 5.6, 5.8),
    Word("b", 5.9, 6.0),
]


def write_tokenizer(path):
    """A sentencepiece model of a few pieces; returns it loaded."""
    path.write_bytes(train_tokenizer(["ab ba aba bab abba aa bb aabb a b"] * 5, vocab_size=12))
    return load_tokenizer(path)


def metadata(facts=None):
    """What `ttt_jax.data.conversations` would have recorded, without voices."""
    spoken = [
        {
            "fact": fact,
            "role": role,
            "speaker": speaker,
            "start_s": start,
            "end_s": end,
            "start_frame": int(start * RATE_HZ + 1e-6),
            "end_frame": int(end * RATE_HZ + 1e-6) + 1,
        }
        for fact, role, speaker, start, end in EVENTS
    ]
    return {"facts": FACTS if facts is None else facts, "spoken": spoken}


def dataset(tokenizer, *, seeds=(0, 1), facts=None) -> TokenDataset:
    """A recording for each seed, alike but for their audio."""
    sources = []
    for seed in seeds:
        codes = np.random.default_rng(seed).integers(0, 20, (5, FRAMES))
        codes[0] = text_stream(WORDS, tokenizer, FRAMES, RATE_HZ)
        record = {"id": f"planted-{seed}", "codes": codes.T, "metadata": json.dumps(metadata(facts))}
        sources.append({**record, "id": record["id"].encode(), "metadata": record["metadata"].encode()})
    return TokenDataset(sources, INFO, [FRAMES] * len(seeds))
