"""Networks of the GFI framework: published parameter counts, shapes, and composition."""

import pytest
import torch
from torch import nn

from sciml.inverse.seismic import (
    GFIModel,
    SeismicDecoder,
    SeismicEncoder,
    UNetTranslation,
    VelocityCritic,
    VelocityDecoder,
    VelocityEncoder,
    auto_linear,
    fno,
    inversion_net,
    invertible_xnet,
    latent_unet,
    velocity_gan,
    waveform_net,
)

SMALL = {"seismic_shape": (2, 100, 16), "velocity_shape": (16, 16)}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "seismic", "velocity"),
    [
        (70, (55_680, 186_497), (11_632, 27_877)),
        (64, (55_680, 186_497), (97_648, 240_869)),
        (32, (55_680, 186_497), (97_648, 240_869)),
        (16, (137_984, 186_961), (245_488, 245_109)),
        (8, (220_288, 302_033), (393_328, 392_949)),
    ],
)
def test_published_autoencoders(size, seismic, velocity):
    assert (count(SeismicEncoder(size)), count(SeismicDecoder(size))) == seismic
    assert (count(VelocityEncoder(size)), count(VelocityDecoder(size))) == velocity


@pytest.mark.parametrize(
    ("size", "encoded", "decoded_seismic", "decoded_velocity"),
    [
        (70, (74, 70), (847, 70), (70, 70)),
        (64, (63, 70), (805, 64), (70, 70)),
        (32, (32, 35), (993, 63), (71, 71)),
        (16, (16, 20), (961, 61), (69, 69)),
        (8, (7, 11), (897, 57), (73, 73)),
    ],
)
def test_published_sizes_before_the_resize(size, encoded, decoded_seismic, decoded_velocity):
    encoder, decoder = SeismicEncoder(size, width=8), SeismicDecoder(size, width=8)
    velocity_decoder = VelocityDecoder(size, width=8)
    latent = torch.zeros(1, 8, size, size)
    with torch.no_grad():
        assert encoder.layers(torch.zeros(1, 5, 1000, 70)).shape[-2:] == encoded
        assert decoder.layers(latent).shape[-2:] == decoded_seismic
        assert velocity_decoder.layers(latent).shape[-2:] == decoded_velocity
        assert encoder(torch.zeros(1, 5, 1000, 70)).shape == (1, 8, size, size)
        assert decoder(latent).shape == (1, 5, 1000, 70)
        assert VelocityEncoder(size, width=8)(torch.zeros(1, 1, 70, 70)).shape[-1] == size


@pytest.mark.parametrize(
    ("repeats", "skip", "translation", "model"),
    [
        (1, True, 17_856_000, 18_137_686),
        (1, False, 16_381_440, 16_663_126),
        (2, True, 34_679_040, 34_960_726),
        (2, False, 33_204_480, 33_486_166),
    ],
)
def test_published_latent_unets(repeats, skip, translation, model):
    with torch.device("meta"):
        net = latent_unet(repeats=repeats, skip=skip)
    assert count(net.translation) == translation
    assert count(net) == model


@pytest.mark.parametrize(
    ("size", "parameters"),
    [(70, 26_067_030), (64, 26_366_038), (32, 26_366_038), (16, 26_600_886), (8, 27_093_942)],
)
def test_published_xnets(size, parameters):
    assert count(invertible_xnet(latent_size=size)) == parameters


def test_published_baselines():
    with torch.device("meta"):
        assert count(inversion_net()) == 24_409_123
        assert count(waveform_net()) == 10_217_718
        assert count(VelocityCritic()) == 1_180_003
    assert count(fno()) == 7_382_021


@pytest.mark.parametrize("size", [32, 16, 8])
def test_strides_of_two_lose_no_receiver(size):
    """As published, decoders leave columns constant and encoders see every other receiver."""
    torch.manual_seed(0)
    latents = torch.randn(2, 8, size, size)
    recordings = torch.randn(2, 5, 250, 70)
    changed = recordings.clone()
    changed[..., 1::2] = torch.randn(2, 5, 250, 35)
    for legacy in (True, False):
        decoder = SeismicDecoder(size, (5, 250, 70), width=8, legacy_alignment=legacy).eval()
        encoder = SeismicEncoder(size, width=8, legacy_alignment=legacy).eval()
        with torch.no_grad():
            # Up to the last convolution, which alone reaches from column to column.
            a, b = decoder.layers[:-1](latents)
            blind = (a == b).all(dim=(0, 1)).float().mean()
            reaction = (encoder(recordings) - encoder(changed)).abs().max()
        if legacy:
            assert blind == pytest.approx(1 - 1 / (64 // size), abs=0.02)
            assert reaction == 0
        else:
            assert blind == 0
            assert reaction > 0
        assert count(decoder) == count(SeismicDecoder(size, (5, 250, 70), width=8))
        assert count(encoder) == count(SeismicEncoder(size, width=8))


def test_unet_sizes():
    x = torch.randn(1, 4, 70, 70, generator=torch.Generator().manual_seed(0))
    legacy, ours = (UNetTranslation(4, legacy_alignment=a) for a in (True, False))
    with torch.no_grad():
        assert legacy(x).shape == x.shape
        assert ours(x).shape == x.shape
        # Twice the first pooled size: odd sizes do not come back in the published network.
        assert legacy(x[..., :33, :33]).shape[-2:] == (32, 32)
        assert ours(x[..., :33, :33]).shape[-2:] == (33, 33)
    with pytest.raises(ValueError, match="at least 4 pixels"):
        ours(x[..., :3, :3])


def test_unet_does_not_mix_samples():
    net = UNetTranslation(4).eval()
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(x.flip(0)), net(x).flip(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: latent_unet(latent_size=16, width=8, repeats=1, **SMALL),
        lambda: inversion_net(width=2, **SMALL),
        lambda: velocity_gan(width=2, **SMALL)[0],
        lambda: invertible_xnet(latent_size=16, width=8, architecture=(1, 1), **SMALL),
        lambda: auto_linear(width=2, layout=16, **SMALL),
    ],
)
def test_inverse_models_give_velocity(make):
    model = make().eval()
    assert model(torch.zeros(3, 2, 100, 16)).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: latent_unet("forward", latent_size=16, width=8, repeats=1, **SMALL),
        lambda: waveform_net(width=2, seismic_shape=(2, 100, 16)),
        lambda: fno(width=2, modes=4, seismic_shape=(2, 100, 16)),
    ],
)
def test_forward_models_give_seismic_data(make):
    model = make().eval()
    assert model(torch.zeros(3, 1, 16, 16)).shape == (3, 2, 100, 16)


def test_xnet_translations_undo_each_other():
    model = invertible_xnet(latent_size=16, width=8, architecture=(2, 2), **SMALL).eval()
    latent = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        back = model.translation.inverse(model.translation(latent))
    torch.testing.assert_close(back, latent, atol=1e-4, rtol=0)


def test_composition_is_encode_translate_decode():
    torch.manual_seed(0)
    model = latent_unet(latent_size=16, width=8, repeats=1, **SMALL).eval()
    p = torch.randn(2, 2, 100, 16, generator=torch.Generator().manual_seed(1))
    v = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.decoder_v(model.translation(model.encoder_p(p)))
        torch.testing.assert_close(model(p), expected)
        torch.testing.assert_close(
            model.reconstruct_velocity(v), model.decoder_v(model.encoder_v(v))
        )
        torch.testing.assert_close(
            model.reconstruct_seismic(p), model.decoder_p(model.encoder_p(p))
        )


def test_missing_parts_are_named():
    model = inversion_net(width=2, **SMALL)
    with pytest.raises(ValueError, match="direction='inverse' cannot predict seismic"):
        model.predict_seismic(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="no encoder_v"):
        model.reconstruct_velocity(torch.zeros(1, 1, 16, 16))
    part = nn.Identity()
    with pytest.raises(ValueError, match="decoder_v .*'inverse'"):
        GFIModel(part, part, part, None, part)
    with pytest.raises(ValueError, match="translation must have an inverse"):
        GFIModel(part, part, part, part, part, direction="both")
    with pytest.raises(ValueError, match="2 modules for direction='inverse'"):
        GFIModel(part, part, (part, part), part, part)
    with pytest.raises(ValueError, match="direction .*'sideways'"):
        GFIModel(part, part, part, part, part, direction="sideways")
    with pytest.raises(ValueError, match="latent_size .*48"):
        latent_unet(latent_size=48)
    with pytest.raises(ValueError, match=r"\(batch, 2, height, width\), got \(1, 3, 100, 16\)"):
        latent_unet(latent_size=16, width=4, repeats=1, **SMALL)(torch.zeros(1, 3, 100, 16))
    assert latent_unet(latent_size=48, layout=32, width=4, repeats=1, **SMALL)
