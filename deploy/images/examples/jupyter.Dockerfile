# JupyterLab for a user that is not root, with the limit of the image that it inherits from:
#   docker build --file deploy/images/examples/jupyter.Dockerfile --tag jupyter:4gb deploy/images/examples
#   docker run --publish 8888:8888 --gpus '"device=0"' jupyter:4gb
ARG IMAGE=fgpu:u24-cu13.0-4gb
FROM ${IMAGE}

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir jupyterlab numba-cuda
ENV PATH=/opt/venv/bin:$PATH

RUN useradd --create-home notebook
USER notebook
WORKDIR /home/notebook

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]
