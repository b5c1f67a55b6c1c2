"""What adapters of serving engines share: what a checkpoint says of its layers, a rank's weights and shapes, and who runs a layer."""
