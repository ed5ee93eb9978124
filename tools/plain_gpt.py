"""The baseline of the benchmarks: a GPT and its AdamW step in plain PyTorch, nothing of fp8lm.

The arithmetic is that of preset bf16: BF16 weights and activations, fp32 softmax, gradients summed
in fp32, fp32 master weights and moments, clipping by the global norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lm.batch import Batch


class PlainAttention(nn.Module):
    """Causal self-attention with rotary positions on [B,S,H]."""

    def __init__(self, hidden: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(hidden, 3 * heads * size)
        self.proj = nn.Linear(heads * size, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B,S,H] -> [B,S,H]."""
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, self.heads, 3, self.size).unbind(3)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        # fp32 on CPU, where torch's bf16 attention is the slower one.
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(context.to(x.dtype).transpose(1, 2).reshape(b, s, -1))


class PlainLayer(nn.Module):
    """Pre-norm transformer layer with a GELU MLP."""

    def __init__(self, hidden: int, heads: int, size: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = PlainAttention(hidden, heads, size)
        self.fc1, self.fc2 = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B,S,H] -> [B,S,H]."""
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """Token ids [B,S] to logits [B,S,V], tied head, in BF16.

    `size`: features of a head (default: hidden / heads); `ffn`: of the MLP (default: 4 hidden).
    """

    def __init__(
        self,
        layers: int,
        hidden: int,
        heads: int,
        vocab: int,
        seq: int,
        *,
        size: int | None = None,
        ffn: int | None = None,
    ) -> None:
        super().__init__()
        size, ffn = size or hidden // heads, ffn or 4 * hidden
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(PlainLayer(hidden, heads, size, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        angle = torch.outer(torch.arange(seq), 10000.0 ** (-torch.arange(0, size, 2) / size))
        angle = torch.cat((angle, angle), dim=-1)[:, None, :]
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        self.to(torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,S] -> [B,S,V]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return functional.linear(self.norm(x), self.embedding.weight)


class PlainTraining:
    """A step after each call: BF16 `model` ([B,S] -> logits), fp32 master weights in `AdamW`."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        decay = [p for p in self.masters if p.ndim > 1]
        rest = [p for p in self.masters if p.ndim == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def step(self, microbatches: list[Batch]) -> Tensor:
        """Forward, backward, update; the mean loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=microbatches[0].tokens.device)
        for batch in microbatches:
            logits = self.model(batch.tokens)
            labels = batch.labels.flatten()
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels)
            loss = loss / len(microbatches)
            loss.backward()
            total = total + loss.detach()
            self._collect_gradients()
        self.update()
        return total

    def update(self) -> None:
        """Clip, step, and make the BF16 weights anew."""
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def _collect_gradients(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
