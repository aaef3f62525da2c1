"""Sliding-window attention with global tokens against a naive reference, outputs and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, LongformerConfig, LongformerModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from realm.attention import naive, windowed
from realm.attention.binding import bind_attention
from realm.attention.longformer import LongformerAttention, LongformerSelfAttention
from realm.errors import UserError

HEADS, WIDTH = 2, 6


@pytest.fixture(scope="module", params=["blocks of a CPU", "one call of a GPU"], autouse=True)
def path(request):
    """Both ways to compute windows, on texts of a few tokens: many small blocks one after
    another, and all in one call."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "one call of a GPU":
            patch.setattr(windowed, "windowed_attention", windowed._all_blocks_at_once)
        for name, value in (("_SHORTEST_BLOCK", 3), ("_LONGEST_BLOCK", 5), ("CACHED_SCORES", 120)):
            patch.setattr(windowed, name, value)
        yield


def attention(window: int, dropout: float = 0.0, dilation: tuple[int, ...] = ()) -> LongformerSelfAttention:
    """A module in float64 whose global projections differ from the local ones."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, attention_probs_dropout_prob=dropout)
    module = LongformerSelfAttention(BertSelfAttention(config), window, dilation).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return module


def naive_rows(module: LongformerSelfAttention, hidden_BLW: Tensor, real_BL: Tensor, global_BL: Tensor) -> Tensor:
    """`naive.longformer` on every row and head, (B, L, W); zero on padding."""
    B, L, width = hidden_BLW.shape
    rows = []
    for b in range(B):
        hidden_LW, is_global_L = hidden_BLW[b, real_BL[b]], global_BL[b, real_BL[b]].tolist()
        local_qkv = [projection(hidden_LW) for projection in (module.query, module.key, module.value)]
        global_projections = (module.query_global, module.key_global, module.value_global)
        global_qkv = [projection(hidden_LW) for projection in global_projections]
        heads = []
        for h, dilation in enumerate(module.dilation):
            part = slice(h * width // HEADS, (h + 1) * width // HEADS)
            qkvs = [tuple(x[:, part] for x in qkv) for qkv in (local_qkv, global_qkv)]
            heads.append(naive.longformer(*qkvs, is_global_L, module.window, dilation))
        rows.append(torch.nn.functional.pad(torch.cat(heads, 1), (0, 0, 0, L - len(hidden_LW))))
    return torch.stack(rows)


def inputs(lengths: list[int], padding: int, num_global: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, real tokens, and up to `num_global` global tokens a row anywhere among its
    tokens, some rows with fewer."""
    generator = torch.Generator().manual_seed(seed)
    L = max(lengths) + padding
    hidden_BLW = torch.randn(len(lengths), L, WIDTH, generator=generator, dtype=torch.float64)
    real_BL = torch.arange(L) < torch.tensor(lengths)[:, None]
    global_BL = torch.zeros_like(real_BL)
    for b, length in enumerate(lengths):
        global_BL[b, torch.randperm(length, generator=generator)[: max(0, num_global - b)]] = True
    return hidden_BLW, real_BL, global_BL


def outputs_and_gradients(function, module, hidden_BLW, real_BL, global_BL) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs on real tokens, and the gradients of one random combination of them on the input
    and all parameters."""
    module.zero_grad()
    hidden_BLW = hidden_BLW.clone().requires_grad_()
    out = function(hidden_BLW, real_BL, global_BL)[real_BL]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight).sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }
    return out, gradients | {"hidden": hidden_BLW.grad}


@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
    window=st.integers(1, 9),
    padding=st.integers(0, 5),
    num_global=st.integers(0, 4),
    dilation=st.sampled_from([(), (1, 2), (3, 3), (5, 1)]),
    seed=st.integers(0, 1000),
)
@example(lengths=[17, 5], window=4, padding=3, num_global=1, dilation=(), seed=0)
@example(lengths=[16, 16], window=4, padding=0, num_global=3, dilation=(1, 2), seed=0)
@example(lengths=[9, 1], window=2, padding=2, num_global=0, dilation=(2, 4), seed=0)
@settings(max_examples=30, deadline=None)
def test_outputs_and_gradients_are_those_of_the_naive_reference(lengths, window, padding, num_global, dilation, seed):
    module = attention(window, dilation=dilation)
    hidden_BLW, real_BL, global_BL = inputs(lengths, padding, num_global, seed)
    fast, fast_gradients = outputs_and_gradients(
        lambda hidden, real, marked: module(hidden, attention_mask=real.long(), global_mask=marked)[0],
        module,
        hidden_BLW,
        real_BL,
        global_BL,
    )
    slow, slow_gradients = outputs_and_gradients(
        lambda *args: naive_rows(module, *args), module, hidden_BLW, real_BL, global_BL
    )
    torch.testing.assert_close(fast, slow, atol=1e-10, rtol=0)
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(
            fast_gradients[name], gradient, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(gradient.isfinite().all() for gradient in fast_gradients.values())


def test_half_precision_is_close_in_outputs_and_gradients():
    module = attention(4)
    hidden_BLW, real_BL, global_BL = inputs([30, 17], 3, 2, 2)
    exact, exact_gradients = outputs_and_gradients(
        lambda *args: module(*args)[0], module, hidden_BLW, real_BL, global_BL
    )

    def rounded(hidden, real, marked):
        with torch.autocast("cpu", torch.bfloat16):
            return module.float()(hidden.float(), real, marked)[0].double()

    out, gradients = outputs_and_gradients(rounded, module, hidden_BLW, real_BL, global_BL)
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.05)
    for name, gradient in exact_gradients.items():
        assert (gradients[name] - gradient).norm() < 0.06 * max(2.0, gradient.norm().item()), name


def test_global_projections_are_used_and_start_as_copies():
    module = attention(2)
    hidden_BLW, real_BL, global_BL = inputs([12], 0, 1, 0)
    _, gradients = outputs_and_gradients(
        lambda hidden, real, marked: module(hidden, real, marked)[0], module, hidden_BLW, real_BL, global_BL
    )
    assert all(gradients[f"{name}_global.weight"].abs().max() > 1e-3 for name in ("query", "key", "value"))
    local = BertSelfAttention(BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS))
    fresh = LongformerSelfAttention(local, 2)
    for name in ("query", "key", "value"):
        ours, copy = getattr(fresh, name).weight, getattr(fresh, f"{name}_global").weight
        assert ours is getattr(local, name).weight and ours is not copy and torch.equal(ours, copy)


@pytest.mark.parametrize("extra", [1, 3, 4, 11])
def test_padding_columns_and_their_content_change_nothing(extra):
    module = attention(4)
    hidden_BLW, real_BL, global_BL = inputs([14, 6], 0, 2, 5)
    short = module(hidden_BLW, real_BL, global_BL)[0]
    columns = 100 * torch.randn(2, extra, WIDTH, dtype=torch.float64)
    none = torch.zeros(2, extra, dtype=torch.bool)
    wide = module(torch.cat([hidden_BLW, columns], 1), torch.cat([real_BL, none], 1), torch.cat([global_BL, none], 1))[
        0
    ]
    torch.testing.assert_close(wide[:, :14][real_BL], short[real_BL], atol=1e-12, rtol=0)
    assert wide.isfinite().all()
    # A global mark on padding counts for nothing either.
    marked = module(
        torch.cat([hidden_BLW, columns], 1), torch.cat([real_BL, none], 1), torch.cat([global_BL, ~none], 1)
    )[0]
    torch.testing.assert_close(marked[:, :14][real_BL], short[real_BL], atol=1e-12, rtol=0)


def test_rows_without_global_tokens_see_their_window_alone():
    module = attention(3)
    hidden_BLW, real_BL, _ = inputs([12, 12], 0, 0, 1)
    global_BL = torch.zeros_like(real_BL)
    global_BL[0, 0] = True
    far = hidden_BLW.clone()
    far[:, 0] += 1.0
    change_BL = (module(far, real_BL, global_BL)[0] - module(hidden_BLW, real_BL, global_BL)[0]).abs().amax(-1)
    assert (change_BL[0] > 1e-9).all(), "all tokens see a global one"
    assert (change_BL[1, :4] > 1e-9).all() and not change_BL[1, 4:].any()


def test_without_a_global_mask_the_first_token_is_global():
    module = attention(2)
    hidden_BLW, real_BL, _ = inputs([11, 7], 0, 0, 2)
    first_BL = torch.zeros_like(real_BL)
    first_BL[:, 0] = True
    torch.testing.assert_close(module(hidden_BLW, real_BL)[0], module(hidden_BLW, real_BL, first_BL)[0], atol=0, rtol=0)
    torch.testing.assert_close(
        module(hidden_BLW)[0], module(hidden_BLW, torch.ones_like(real_BL), first_BL)[0], atol=0, rtol=0
    )


def test_dropout_in_training_only():
    module = attention(2, dropout=0.5)
    hidden_BLW, real_BL, global_BL = inputs([9], 0, 1, 3)
    assert not torch.equal(module.train()(hidden_BLW, real_BL, global_BL)[0], module(hidden_BLW, real_BL, global_BL)[0])
    assert torch.equal(module.eval()(hidden_BLW, real_BL, global_BL)[0], module(hidden_BLW, real_BL, global_BL)[0])


def test_nothing_of_length_squared_is_kept_for_backward():
    """Twice the length keeps twice as many numbers: memory grows linearly."""
    module = attention(8)

    def kept(length: int) -> int:
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        hidden_BLW, real_BL, global_BL = inputs([length], 0, 2, 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(hidden_BLW, real_BL, global_BL)
        return sum(sizes)

    assert kept(1024) < 2.1 * kept(512)


def test_windows_by_layer_and_dilation_by_head_come_from_the_config():
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
    layers = [BertSelfAttention(config) for _ in range(3)]
    built = LongformerAttention(layer_windows=(4, 8, 16), dilation=(1, 3)).replace_all(layers)
    assert [module.window for module in built] == [4, 8, 16] and all(module.dilation == (1, 3) for module in built)
    assert [module.window for module in LongformerAttention(window=5).replace_all(layers)] == [5, 5, 5]
    for wrong, said in (
        (LongformerAttention(layer_windows=(4, 8)), "2 layers where the encoder has 3"),
        (LongformerAttention(dilation=(1, 2, 3)), "3 heads where the encoder has 2"),
    ):
        with pytest.raises(UserError, match=said):
            wrong.replace_all(layers)
    for fields in ({"window": 0}, {"layer_windows": (4, 0)}, {"dilation": (0, 1)}):
        with pytest.raises(UserError, match="at least 1"):
            LongformerAttention(**fields)


def test_the_whole_model_is_transformers_longformer():
    """Weights of a `LongformerModel` in a BERT with this attention: the same hidden states."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
        "type_vocab_size": 1,
    }
    theirs = LongformerModel(
        LongformerConfig(
            **sizes, attention_window=[8, 12], max_position_embeddings=66, pad_token_id=1, initializer_range=0.4
        )
    ).eval()
    bert = BertModel(
        BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.4), add_pooling_layer=False
    ).eval()
    bind_attention(bert, LongformerAttention(layer_windows=(4, 6)))
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("pooler.")}
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][
        2:
    ]  # theirs begin behind the pad's
    missing, unexpected = bert.load_state_dict(state, strict=False)
    assert not missing and all("position_ids" in name for name in unexpected)
    ids = torch.randint(2, 40, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 29:], mask[1, 29:] = 1, 0
    global_mask = torch.zeros_like(ids)
    global_mask[:, 0] = global_mask[0, 7] = 1
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, global_attention_mask=global_mask).last_hidden_state
        found = bert(input_ids=ids, attention_mask=mask, global_mask=global_mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)
