"""Parts of fastload that enter through the same hooks as everybody's plugins."""
