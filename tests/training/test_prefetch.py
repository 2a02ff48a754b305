"""Batches on the device: copied once each, on a GPU ahead of their step and on a stream of their own.

No GPU is here: stand-ins for its streams and tensors write down in which order they are used.
"""

from contextlib import contextmanager

import pytest
import torch

from unet_denoiser.training.prefetch import copy_ahead, to_device

GPU = torch.device("cuda", 0)


class FakeStreams:
    """torch.cuda's streams and events, which write down what happens on them."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.events = [], "main", 0
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_stream", self.find)

    def make(self, device):
        assert device == GPU
        return FakeStream("side", self)

    def find(self, device):
        assert device == GPU
        return FakeStream(self.current, self)

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class FakeStream:
    def __init__(self, name, streams):
        self.name, self.streams = name, streams

    def record_event(self):
        self.streams.events += 1
        return self.streams.events - 1

    def wait_event(self, event):
        self.streams.log.append(f"{self.name} waits for copy {event}")


class FakeTensor(torch.Tensor):
    """A tensor that writes down its copies, and which stream its memory is kept for."""

    streams: FakeStreams

    def to(self, device, non_blocking=False):
        assert (device, non_blocking) == (GPU, True)
        self.streams.log.append(f"{self.streams.current} copies {int(self)}")
        return self

    def record_stream(self, stream):
        self.streams.log.append(f"{int(self)} is kept for {stream.name}")


@pytest.fixture
def streams(monkeypatch):
    FakeTensor.streams = FakeStreams(monkeypatch)
    return FakeTensor.streams


def test_a_gpu_copies_the_next_batch_before_the_step_and_waits_for_its_own_alone(streams):
    batches = ({"image": torch.tensor(i).as_subclass(FakeTensor), "name": str(i)} for i in range(3))
    for batch in to_device(batches, GPU):
        streams.log.append(f"step {batch['name']}")
    expected = ["side copies 0"]
    for i in range(3):
        expected += [f"side copies {i + 1}"] * (i < 2)
        expected += [f"main waits for copy {i}", f"{i} is kept for main", f"step {i}"]
    assert streams.log == expected


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches_all_come(streams, count):
    batches = [{"image": torch.tensor(i).as_subclass(FakeTensor)} for i in range(count)]
    assert list(copy_ahead(batches, GPU)) == batches


def test_at_most_one_batch_is_read_ahead_of_the_step(streams):
    read = []

    def load():
        for i in range(4):
            read.append(i)
            yield {"image": torch.tensor(i).as_subclass(FakeTensor)}

    steps = to_device(load(), GPU)
    for number in range(4):
        assert int(next(steps)["image"]) == number
        assert len(read) == min(number + 2, 4)
