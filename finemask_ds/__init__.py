"""Find sparse subnetworks of pre-trained language models with DeepSpeed (OMP, IMP, TAMT)."""
