"""Published peaks of devices, and the refusal of all others."""

import pytest

from kan_train.accounting import Peak, peak_flops
from kan_train.accounting.peaks import PEAKS, known_peak_flops
from kan_train.config import ConfigError

UNKNOWN = ("cpu", "AMD EPYC 9B14", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA Z999", "")


def test_peaks_are_the_published_ones():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H200", "bf16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA B200", "bf16") == pytest.approx(2250e12)
    assert peak_flops(" NVIDIA A100-SXM4-80GB ", "fp32") == pytest.approx(19.5e12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_device_is_refused_by_name_with_the_setting(name: str):
    with pytest.raises(ConfigError, match=r"none is guessed; set cluster\.peak_tflops") as refusal:
        peak_flops(name, "bf16")
    assert repr(name) in str(refusal.value)
    assert known_peak_flops(name, "bf16") is None
    assert peak_flops(name, "bf16", peak_tflops=0.2) == pytest.approx(0.2e12)


def test_a_refusal_names_similar_devices_that_would_work():
    with pytest.raises(ConfigError, match=r"cluster\.device_name.*NVIDIA H100 80GB HBM3"):
        peak_flops("NVIDIA H100 80GB HBM3e", "bf16")


def test_a_precision_that_the_source_does_not_give_is_refused():
    with pytest.raises(ConfigError, match="'NVIDIA B200' in fp32"):
        peak_flops("NVIDIA B200", "fp32")
    for ask in (peak_flops, known_peak_flops):
        with pytest.raises(ConfigError, match=r"train\.precision"):
            ask("NVIDIA H100 80GB HBM3", "fp8")


@pytest.mark.parametrize("name", PEAKS)
def test_every_peak_has_a_source(name: str):
    peak: Peak = PEAKS[name]
    assert peak.source
    assert peak.bf16 is not None
    assert peak.fp32 is None or peak.fp32 < peak.bf16


def test_the_setting_goes_before_the_table():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", peak_tflops=1.0) == 1e12
