# PyTorch, with the limit of the image that it inherits from:
#   docker build --file deploy/images/examples/pytorch.Dockerfile --tag torch:8gb deploy/images/examples
ARG IMAGE=fgpu:u24-cu13.0-8gb
FROM ${IMAGE}

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir torch
ENV PATH=/opt/venv/bin:$PATH

CMD ["python3", "-c", "import torch; print('free, total:', torch.cuda.mem_get_info())"]
