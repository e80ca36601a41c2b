"""What stands on a text model: language models, classifiers, BERT's pretraining.

B batch, T tokens, C classes, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.core.attention import only_at
from diptych.core.config import StackConfig
from diptych.core.dropout import Dropout
from diptych.core.memory import Memory, Past
from diptych.models.language import LanguageHead, TextConfig, TextModel


class TiedHead(nn.Module):
    """GPT-2's: the word embeddings and nothing else. (…, D) → (…, V)."""

    def __init__(self, words: nn.Embedding):
        super().__init__()
        self.decoder = nn.Linear(words.embedding_dim, words.num_embeddings, bias=False)
        self.decoder.weight = words.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(hidden)


class Pooler(nn.Module):
    """BERT's and RoBERTa's: the first token's state through a layer and tanh. (B, T, D) → (B, D)."""

    def __init__(self, width: int, dropout: float = 0.0):
        """dropout: of what comes in (RoBERTa's classifier)."""
        super().__init__()
        self.drop = Dropout(dropout)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.dense(self.drop(hidden[:, 0])).tanh()


class LastToken(nn.Module):
    """GPT-2's classifiers': the last real token's state. (B, T, D), mask (B, T) → (B, D)."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return last_of(hidden, mask)


def last_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """States (B, T, D), mask (B, T) → (B, D): each row's last real one."""
    return hidden[:, -1] if mask is None else only_at(hidden, last_place(mask)[:, None])[:, 0]


def last_place(mask: Tensor) -> Tensor:
    """(B, T), non-zero for real tokens → (B,): where the last of them stands."""
    return torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), 0).amax(1)


def bert_head(words: nn.Embedding, stack: StackConfig) -> LanguageHead:
    return LanguageHead(words, stack.eps, stack.activation)


HEADS = {
    "bert": bert_head,
    "roberta": lambda words, stack: LanguageHead(words, stack.eps),  # whatever its blocks' activation
    "tied": lambda words, stack: TiedHead(words),
}


class LanguageModel(nn.Module):
    """A text model and its LM head: logits (B, T, V) of each token (BERT) or of the one after it (a causal model).

    head: "bert", "roberta" or "tied" (GPT-2's).
    """

    entrances = ("project", "step")

    def __init__(self, config: TextConfig, head: str = "bert"):
        super().__init__()
        self.text = TextModel(config)
        self.language_head = HEADS[head](self.text.embeddings.word, config.stack)

    def project(self, context: Tensor, mask: Tensor | None = None) -> Memory:
        """What the model will look at, (P, N, context width); see `Stack.project`."""
        return self.text.stack.project(context, mask)

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        """As `TextModel.forward`."""
        return self.language_head(self.text(ids, mask, **options))

    def step(self, past: Past, ids: Tensor, memory: Memory | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the token after `ids` (B, T), which follow on `past` and extend it. mask: (B, T), 0 for
        padding on the left."""
        return self.language_head(self.text(ids, mask, memory, past, is_causal=True)[:, -1])


class PooledText(nn.Module):
    """A text model and its pooler: states (B, T, D) and (B, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.text = TextModel(config)
        self.pooler = Pooler(config.stack.width)

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
        hidden = self.text(ids, mask, **options)
        return hidden, self.pooler(hidden)


class PretrainingModel(PooledText):
    """BERT as it was pretrained (Devlin et al. 2019): masked words, (B, T, V), and whether the second of two texts
    follows on the first, (B, 2): 0 it does."""

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.language_head = bert_head(self.text.embeddings.word, config.stack)
        self.next_sentence = nn.Linear(config.stack.width, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
        hidden, pooled = super().forward(ids, mask, **options)
        return self.language_head(hidden), self.next_sentence(pooled)


class SequenceClassifier(nn.Module):
    """Logits (B, C) of a whole text.

    pooled: "bert" (pooler, then dropout), "roberta" (dropout on both sides of the layer) or "last" (GPT-2: the last
    real token, no bias).
    """

    def __init__(self, config: TextConfig, classes: int, pooled: str = "bert", dropout: float | None = None):
        """dropout: the stack's when None."""
        super().__init__()
        width, dropout = config.stack.width, config.stack.dropout if dropout is None else dropout
        self.text = TextModel(config)
        self.pooler = LastToken() if pooled == "last" else Pooler(width, dropout if pooled == "roberta" else 0.0)
        self.drop = Dropout(0.0 if pooled == "last" else dropout)
        self.classifier = nn.Linear(width, classes, bias=pooled != "last")

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        return self.classifier(self.drop(self.pooler(self.text(ids, mask, **options), mask)))


class TokenClassifier(nn.Module):
    """Logits (B, T, C) of each token."""

    def __init__(self, config: TextConfig, classes: int, dropout: float | None = None):
        """dropout: the stack's when None."""
        super().__init__()
        self.text = TextModel(config)
        self.drop = Dropout(config.stack.dropout if dropout is None else dropout)
        self.classifier = nn.Linear(config.stack.width, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        return self.classifier(self.drop(self.text(ids, mask, **options)))
