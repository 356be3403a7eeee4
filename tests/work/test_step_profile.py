"""The table that explains a training step: what is counted, and as what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import shapes, shards, write
from benchmarks.step_profile import Ran, beside, busy_seconds, kind_of, summary

pytestmark = pytest.mark.work

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "transfers, fills"),
        ("void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 1, 256, 1>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<at::native::LpNormFunctor<float>>", "gradient clipping"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForwardReg<float>", "cross-entropy"),
        ("_chunked_cross_entropy_forward", "cross-entropy"),
        ("triton_red_fused__log_softmax__to_copy_0", "cross-entropy"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 7>", "routing, indexing"),
        ("place_slots", "routing, indexing"),
        ("router_backward", "routing, indexing"),
        ("linear", "4-bit products"),
        ("grouped_matmul", "4-bit products"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "4-bit decoding"),
        ("nf4_decode", "4-bit decoding"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("_rms_layernorm_forward", "norms, rope, activations"),
        ("triton_poi_fused__to_copy_mul_silu_1", "norms, rope, activations"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies, casts"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>>", "other elementwise"),
        ("something_nobody_knows", "other"),
    ],
)
def test_a_kernels_name_says_what_kind_of_work_it_does(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_what_runs_side_by_side_is_busy_once() -> None:
    assert busy_seconds([Ran("a", 0, 10), Ran("b", 5, 8), Ran("c", 9, 20), Ran("d", 30, 40)]) == pytest.approx(30e-6)


def test_the_rest_of_a_step_was_idle_and_kinds_add_up_to_what_ran() -> None:
    told = summary([Ran("linear", 0, 40), Ran("linear", 50, 60), Ran("memset", 60, 70)], wall=100e-6)
    assert told["busy_seconds"] == pytest.approx(60e-6)
    assert told["idle_seconds"] == pytest.approx(40e-6)
    assert told["kinds"] == {
        "4-bit products": {"seconds": pytest.approx(50e-6), "count": 2},
        "transfers, fills": {"seconds": pytest.approx(10e-6), "count": 1},
    }
    assert told["kernels"][0]["name"] == "linear"
    table = beside({"ours": told, "stock": summary([], wall=1.0)})
    assert table[1].split() == ["4-bit", "products", "0.1", "(", "2)", "0.0", "(", "0)"]


def test_a_written_checkpoint_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write("Qwen3Moe", TINY, tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == 0


def test_shards_hold_every_tensor_once_and_no_more_than_they_may() -> None:
    found = shapes("Qwen3Moe", TINY)
    most = 4096
    lists = list(shards(found, most))
    assert [name for names in lists for name in names] == list(found)
    assert all(len(names) == 1 or sum(2 * found[n].numel() for n in names) <= most for names in lists)
