"Other servers, each with decode and batching of its own: `python benchmarks/peers.py fastai|litserve|bentoml model.onnx port`. Started by serve.py."
import base64
import io
import os
import sys

import numpy as np
from PIL import Image


def prepared(data, w=320, h=320):
    "The way most examples do it: resize, scale, channels first."
    a = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((w, h)), np.float32)
    return ((a-127)/128).transpose(2, 0, 1)


def session(path):
    import onnxruntime as ort
    o = ort.SessionOptions()
    o.intra_op_num_threads = 1
    s = ort.InferenceSession(path, o, providers=["CPUExecutionProvider"])
    return s, s.get_inputs()[0].name, tuple(reversed(s.get_inputs()[0].shape[2:]))


def answer(probs):
    "A score and which pixels, as small as an answer can be."
    d = 1-probs[0]
    return {"score": float(np.sort(d, axis=None)[-20:].mean()), "area": int((d>.5).sum())}


def fastai(_, port):
    import tempfile
    from pathlib import Path
    import torch
    import uvicorn
    from fastai.vision.all import PILImage, PILMask, SegmentationDataLoaders, resnet34, unet_learner
    from fastapi import FastAPI, Request
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp: # two pictures, so that there is a Learner; the weights are random
        for i in range(2):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (240, 240, 3), dtype=np.uint8)).save(f"{tmp}/{i}.png")
            Image.fromarray(np.zeros((240, 240), np.uint8)).save(f"{tmp}/m{i}.png")
        from fastai.vision.all import Resize
        dls = SegmentationDataLoaders.from_label_func(tmp, [Path(tmp)/f"{i}.png" for i in range(2)], label_func=lambda p: PILMask.create(p.parent/f"m{p.name}"), codes=["background", "defect"], item_tfms=Resize(224), bs=1, valid_pct=.5, num_workers=0)
        learn = unet_learner(dls, resnet34, pretrained=False)
        app = FastAPI()

        @app.post("/predict")
        async def predict(request:Request):
            data = await request.body()
            mask, _, probs = learn.predict(PILImage.create(io.BytesIO(data)))
            return {"score": float(probs[1].max()), "area": int((np.asarray(mask)>0).sum())}

        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


try: from litserve import LitAPI
except ImportError: LitAPI = object # in the Python of another peer


class Api(LitAPI): # its workers import this module and look for it here
    def __init__(self, model, **kw):
        super().__init__(**kw)
        self.model = model

    def setup(self, device): self.session, self.input, self.size = session(self.model)
    def decode_request(self, request): return prepared(base64.b64decode(request["image"]), *self.size)
    def batch(self, inputs): return np.stack(inputs)
    def predict(self, x): return self.session.run(None, {self.input: x})[0]
    def unbatch(self, output): return list(output)
    def encode_response(self, output): return answer(output)


def litserve(model, port):
    import litserve as ls
    server = ls.LitServer(Api(model, max_batch_size=4, batch_timeout=.002), accelerator="cpu", workers_per_device=1, timeout=30)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, num_api_servers=1)


def bentoml(model, port):
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.environ["BENCH_MODEL"] = model
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "peers_bento:Spot", "--host", "127.0.0.1", "--port", str(port)])


if __name__ == "__main__": globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
