"""Other projects' fused operators as back ends that can be asked for by name; none is a requirement."""
