# TensorFlow, with the limit of the image that it inherits from:
#   docker build --file deploy/images/examples/tensorflow.Dockerfile --tag tensorflow:8gb deploy/images/examples
ARG IMAGE=fgpu:u22-cu12.3-8gb
FROM ${IMAGE}

RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir 'tensorflow[and-cuda]'
ENV PATH=/opt/venv/bin:$PATH

# TensorFlow takes nearly all of the limit at its first operation, unless this variable is set.
ENV TF_FORCE_GPU_ALLOW_GROWTH=true

CMD ["python3", "-c", "import tensorflow; print(tensorflow.config.list_logical_devices('GPU'))"]
