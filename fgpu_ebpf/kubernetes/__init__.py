"""The Kubernetes device plugin: slots, allocation and the messages to kubelet."""
