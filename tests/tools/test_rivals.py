"""The rivals' best configurations, and the memory they are charged for: SDPA by backend, its flash backend in parts,
FlexAttention's tiles."""

import dataclasses
import inspect

import pytest
import torch

from benchmarks import features, rivals, run, schedule, workloads
from benchmarks.workloads import Workload

FAR = Workload("position", 128, 256, "bfloat16")


class TestBackendOfSdpa:
    def test_on_a_cpu(self):
        """The flash backend needs equal widths, in every dtype: Non-local and ANN. Position gets the math path."""
        for op, expected in (("position", "MATH"), ("non_local", "FLASH_ATTENTION"), ("ann", "FLASH_ATTENTION")):
            for dtype in workloads.DTYPES:
                assert rivals.sdpa_backend(Workload(op, 20, 30, dtype), "cpu") == expected

    def test_the_choice_is_made_for_the_workload(self, monkeypatch):
        asked = []

        def choose(query, key, value, scale):
            asked.append((query, key, value))
            assert all(tensor.requires_grad for tensor in (query, key, value))
            return torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value

        monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
        rivals._sdpa_backend.cache_clear()
        assert (
            rivals.sdpa_backend(Workload("ann", 128, 256, "float16", key_channels=32), "cpu") == "EFFICIENT_ATTENTION"
        )
        rivals._sdpa_backend.cache_clear()
        ((query, key, value),) = asked
        assert (query.shape, key.shape, value.shape) == ((1, 1, 4096, 256), (1, 1, 110, 256), (1, 1, 110, 256))
        assert query.dtype == torch.float16

    @pytest.mark.parametrize("fused", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
    def test_a_fused_backend_stores_no_attention_map(self, fused, monkeypatch):
        """128 x 256, B = 8, needs 99 GiB of attention maps on the math path, and none on a fused backend."""
        many = dataclasses.replace(FAR, batch=8)
        maps = int(workloads.LIVE_ATTENTION_MAPS["sdpa"] * workloads.attention_map_bytes(many, "sdpa"))
        charged = workloads.peak_bytes(many, "sdpa")
        assert charged - workloads.peak_bytes(many, "sdpa", fused) == maps > 80 * 2**30
        plan = schedule.Schedule(None, "cuda")
        for chosen, runs in (("MATH", False), (fused, True)):
            monkeypatch.setattr(rivals, "sdpa_backend", lambda workload, device, chosen=chosen: chosen)
            assert (plan.verdict(many, "sdpa", 78 * 2**30, []) is None) == runs
            assert (run.record(many, "sdpa", "measured", device="cuda")["needed_bytes"] == charged) != runs

    def test_other_rivals_do_not_query_the_backend(self, monkeypatch):
        monkeypatch.setattr(rivals, "sdpa_backend", lambda *_: pytest.fail("asked"))
        for rival in set(rivals.RIVALS) - {"sdpa", "sdpa_onednn"}:
            of = rivals.ONEDNN.get(rival, rival)
            assert rivals.needed_bytes(FAR, rival, "cuda") == workloads.peak_bytes(FAR, of)


class TestFlashInParts:
    @pytest.mark.parametrize(
        "key_channels, value_channels, expected",
        [
            (64, 512, (2, 256)),
            (64, 513, (3, 176)),
            (256, 256, (1, 256)),
            (256, 300, (2, 256)),
            (20, 300, (2, 152)),
            (1, 1, (1, 8)),
        ],
    )
    def test_parts(self, key_channels, value_channels, expected):
        assert workloads.split_heads(key_channels, value_channels) == expected

    def test_a_query_wider_than_a_head(self):
        with pytest.raises(ValueError, match=r"at most 256 channels .*\(got 257\)"):
            workloads.split_heads(257, 512)
        wide = Workload("non_local", 4, 4, channels=1024)
        with pytest.raises(ValueError, match="at most 256"):
            rivals.formulation("sdpa_flash_split", "non_local")(*features_of(wide))
        assert rivals.needed_bytes(wide, "sdpa_flash_split") > 0  # its record can be written

    @pytest.mark.parametrize(
        "op, channels, key_channels",
        [("position", 512, 64), ("position", 300, 20), ("position", 600, 3), ("non_local", 48, 0), ("ann", 40, 0)],
    )
    def test_exact(self, op, channels, key_channels):
        """Equals the definition, forward and backward: several and uneven parts, odd widths, fewer keys than
        queries."""
        workload = Workload(op, 6, 7, "float64", 2, channels, key_channels or 1)
        leaves = features_of(workload)
        grad_output = features.grad_output(workload)
        results = []
        for rival in ("sdpa_flash_split", "eager"):
            output = rivals.formulation(rival, op)(*leaves)
            results.append((output, *torch.autograd.grad(output, leaves, grad_output)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)

    def test_the_flash_backend_gets_one_width(self, monkeypatch):
        seen = []
        original = torch.nn.functional.scaled_dot_product_attention

        def look(query, key, value, scale):
            seen.append((query.shape, key.shape, value.shape, scale))
            assert torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.cuda.math_sdp_enabled()
            return original(query, key, value, scale=scale)

        monkeypatch.setattr(rivals.F, "scaled_dot_product_attention", look)
        workload = Workload("position", 6, 7, batch=3)
        rivals.formulation("sdpa_flash_split", "position")(*features_of(workload))
        assert seen == [((3, 2, 42, 256), (3, 2, 42, 256), (3, 2, 42, 256), 1.0)]


def features_of(workload: Workload) -> list[torch.Tensor]:
    shape = (workload.batch, workload.channels, workload.height, workload.width)
    x = torch.randn(shape).relu()
    return [leaf.requires_grad_() for leaf in features.operands(workload, x).values()]


class FakeValue:
    is_cuda = True

    def __init__(self, channels: int, dtype: torch.dtype):
        self.shape, self.dtype = (1, channels, 97, 97), dtype

    def element_size(self) -> int:
        return self.dtype.itemsize


class TestFlexTiles:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_tiles_fit_a_block_of_an_h100(self, dtype):
        """The tiles that a block keeps plus those of each pipeline stage are below 227 KiB at E = 64, C = 512. Tiles
        divide each other and a mask's blocks of 128, as FlexAttention requires. Triton reports the same 155,648
        bytes."""
        options = rivals.flex_options(FakeValue(512, dtype))
        m, n, stages = options["fwd_BLOCK_M"], options["fwd_BLOCK_N"], options["num_stages"]
        m1, n1, m2, n2 = (options[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2"))
        assert n1 % m1 == m2 % n2 == 0
        assert all(128 % tile == 0 and tile >= 16 for tile in (m, n, m1, n1, m2, n2))
        row = (64 + 512) * dtype.itemsize
        forward = m * 64 * dtype.itemsize + stages * n * row
        assert max(forward, (n1 + stages * m1) * row, (m2 + stages * n2) * row) < 227 * 1024
        if dtype == torch.bfloat16:
            assert forward == 155_648

    def test_only_where_they_are_needed(self):
        assert rivals.flex_options(torch.zeros(1, 512, 2, 2)) is None  # a CPU
        assert rivals.flex_options(FakeValue(256, torch.bfloat16)) is None  # Flex's own choice fits

    def test_option_names(self):
        """FlexAttention ignores unknown options, so each must be one that it documents."""
        from torch.nn.attention.flex_attention import FlexKernelOptions

        known = FlexKernelOptions.__annotations__
        for name in rivals.flex_options(FakeValue(512, torch.bfloat16)):
            assert name.removeprefix("fwd_").removeprefix("bwd_") in known

    def test_options_reach_flex(self, monkeypatch):
        seen = {}

        def flex(query, key, value, **options):
            seen.update(options)
            return value

        options = {"fwd_BLOCK_M": 64}
        monkeypatch.setattr(rivals, "_compiled_flex", lambda: flex)
        monkeypatch.setattr(rivals, "flex_options", lambda value: options)
        workload = Workload("position", 3, 4, channels=8, key_channels=4)
        rivals.formulation("flex", "position")(*features_of(workload))
        assert seen["kernel_options"] is options
        assert seen["scale"] == 1.0
        from torch.nn.attention.flex_attention import flex_attention

        assert {"kernel_options", "block_mask", "scale"} <= set(inspect.signature(flex_attention).parameters)
