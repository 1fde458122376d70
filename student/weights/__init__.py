"""The shipped student's weights (safetensors): ``student=small`` of the mini teacher."""
