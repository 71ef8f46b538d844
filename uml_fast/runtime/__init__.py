"""What the machine and the process give: extension, device, files, signals, progress, traces."""
