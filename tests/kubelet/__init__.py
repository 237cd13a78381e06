"""The device plugin, from the view of kubelet and pods."""
