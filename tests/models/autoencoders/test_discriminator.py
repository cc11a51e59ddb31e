import torch

from sana_lab.models.autoencoders.discriminator import PatchDiscriminator


def test_each_logit_sees_a_patch_of_70_pixels():
    critic = PatchDiscriminator(width=4).eval()
    image = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = critic(image)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
