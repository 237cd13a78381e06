"""The device plugin, as kubelet and pods meet it."""
