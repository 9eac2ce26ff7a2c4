"""The features of photographs on which the benchmarks run."""

import pytest
import torch

from benchmarks import features
from benchmarks.workloads import Workload


class TestFeatures:
    @pytest.mark.parametrize("name", features.PHOTOGRAPHS)
    def test_photographs_need_no_network(self, name, monkeypatch):
        import socket

        def refuse(*arguments, **options):
            raise AssertionError("a download was tried")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        photograph = features.load_photograph(name)
        assert photograph.dtype.name == "uint8"
        assert photograph.ndim == 3
        assert min(photograph.shape[:2]) >= 300
        assert photograph.std() > 20

    def test_photographs_from_files(self, tmp_path):
        from PIL import Image

        path = tmp_path / "picture.png"
        Image.new("L", (20, 10), 7).save(path)
        assert features.load_photograph(str(path)).shape == (10, 20, 3)
        with pytest.raises(ValueError, match="photograph must be one of"):
            features.load_photograph("nothing.png")

    def test_windows_of_one_pass(self):
        photograph = features.load_photograph("coffee")
        extractor = features.Extractor(channels=16)
        source = features.FeatureSource(photograph, [(6, 9), (8, 6)], extractor)
        assert source.features.shape == (1, 16, 8, 9)
        torch.testing.assert_close(source.window(6, 9), source.features[:, :, 1:7])
        assert source.features.isfinite().all()
        assert source.features.std() > 0.1
        with pytest.raises(ValueError, match="features go up to 8x9"):
            source.window(9, 9)
        batch = source.leaves(Workload("position", 6, 9, batch=3, channels=16, key_channels=4))
        assert [tuple(leaf.shape) for leaf in batch.values()] == [(3, 4, 6, 9), (3, 4, 6, 9), (3, 16, 6, 9)]
        assert not torch.equal(batch["value"][0], batch["value"][1])
        again = features.FeatureSource(photograph, [(8, 9)], features.Extractor(channels=16))
        torch.testing.assert_close(again.features, source.features, rtol=0.05, atol=0.05)

    def test_given_weights_are_used(self, tmp_path):
        from torchvision.models import resnet50

        torch.manual_seed(5)
        state = resnet50(weights=None).state_dict()
        path = tmp_path / "resnet50.pth"
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
        extractor = features.Extractor(16, path)
        assert extractor.trained
        assert "resnet50.pth" in extractor.description
        torch.testing.assert_close(extractor.backbone[0].weight, state["conv1.weight"])
        torch.save({"conv1.weight": state["conv1.weight"]}, path)
        with pytest.raises(ValueError, match="is not a ResNet-50"):
            features.Extractor(16, path)
