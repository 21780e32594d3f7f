from tensorrt_llm.sampling_params import GuidedDecodingParams


class MpiCommSession:
    def __init__(self, comm: object = None, n_workers: int = 1) -> None:
        self.comm, self.n_workers = comm, n_workers


__all__ = ["GuidedDecodingParams", "MpiCommSession"]
