"""Ways in which containers get the shim: CDI, engine settings, SELinux and `fgpu run`."""
