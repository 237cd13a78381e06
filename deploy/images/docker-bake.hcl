# Builds every image at once, or some of them. From the repository's root, after ./dev build, run:
#
#   docker buildx bake --file deploy/images/docker-bake.hcl                                     # all 28
#   docker buildx bake --file deploy/images/docker-bake.hcl u22-cu12-3-8gb
#   SIZES=6,16 NAME=registry.example/fgpu docker buildx bake --file deploy/images/docker-bake.hcl --push

variable "NAME" {
  default = "fgpu"
}

variable "SIZES" { # whole GiB
  default = "2,4,8,12"
}

variable "CUDA" { # or a mirror of it: NVIDIA deletes tags some time after a CUDA's end of life
  default = "nvidia/cuda"
}

group "default" {
  targets = ["image"]
}

target "image" {
  name = "u${base.ubuntu}-cu${replace(base.cuda, ".", "-")}-${size}gb"

  # The bases that NVIDIA has published. The other combinations were never published: u20-cu13.0 (CUDA 13 has no 20.04),
  # u22-cu11.1 (older than 22.04), u24-cu11.1, u24-cu11.7 and u24-cu12.3 (24.04 begins with CUDA 12.5.1).
  matrix = {
    base = [
      { ubuntu = "20", cuda = "11.1", tag = "11.1.1-runtime-ubuntu20.04" },
      { ubuntu = "20", cuda = "11.7", tag = "11.7.1-runtime-ubuntu20.04" },
      { ubuntu = "20", cuda = "12.3", tag = "12.3.2-runtime-ubuntu20.04" },
      { ubuntu = "22", cuda = "11.7", tag = "11.7.1-runtime-ubuntu22.04" },
      { ubuntu = "22", cuda = "12.3", tag = "12.3.2-runtime-ubuntu22.04" },
      { ubuntu = "22", cuda = "13.0", tag = "13.0.2-runtime-ubuntu22.04" },
      { ubuntu = "24", cuda = "13.0", tag = "13.0.2-runtime-ubuntu24.04" },
    ]
    size = split(",", SIZES)
  }

  context    = "build/shim"
  dockerfile = "../../deploy/images/Dockerfile"
  args       = { BASE = "${CUDA}:${base.tag}", GB = size }
  tags       = ["${NAME}:u${base.ubuntu}-cu${base.cuda}-${size}gb"]
}
