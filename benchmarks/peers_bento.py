"The BentoML service that `benchmarks/peers.py bentoml` starts: a picture in, batched by BentoML."
import os
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType
from peers import answer, prepared, session


@bentoml.service(workers=1, traffic={"timeout": 30})
class Spot:
    def __init__(self): self.session, self.input, self.size = session(os.environ["BENCH_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=4, max_latency_ms=10_000)
    def predict(self, images:list[Annotated[Path, ContentType("image/jpeg")]])->list[dict]:
        x = np.stack([prepared(Path(p).read_bytes(), *self.size) for p in images])
        return [answer(o) for o in self.session.run(None, {self.input: x})[0]]
