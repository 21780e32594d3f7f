"""The GPUs of a container, as far as the engine's build asks: FAKE_GPUS has the compute capability of each."""

import os


class cuda:  # noqa: N801 -- the name it has
    @staticmethod
    def device_count():
        return len(os.environ["FAKE_GPUS"].split())

    @staticmethod
    def get_device_capability(index):
        return tuple(map(int, os.environ["FAKE_GPUS"].split()[index].split(".")))

    @staticmethod
    def get_device_name(index):
        return "NVIDIA H100 80GB HBM3"
