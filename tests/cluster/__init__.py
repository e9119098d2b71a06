"""Launching on several machines, for real: Slurm, ssh, network interfaces."""
