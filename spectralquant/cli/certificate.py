"""A calibration's certificate as text: what was tried, what it measured, what was kept."""

from spectralquant.profile import Profile


def describe_certificate(profile: Profile) -> str:
    """Several lines for a terminal."""
    c = profile.certificate
    if "kl" not in c:
        return f"no certificate: nothing is known about its quality\n  tokens kept exact in mid-text: {profile.exact_share:.2%}"
    head = (
        f"certificate: {c.get('tokens', 0):,} tokens of the {c.get('corpus', 'own')} corpus, {c.get('seconds', 0):.0f} s; "
        f"at '{c['preset']}' KL {c['kl']:.4f}, same token {c['agreement']:.1%} on {c['scored_tokens']} held-out tokens\n"
        "  (it ranks the candidates below and was chosen on the same tokens: optimistic, expect more on other text)"
    )
    rows = [
        f"  {'kept   ' if row['kept'] else 'dropped'} {_name(row['changed']):<24} KL {row['kl']:.4f}  same token {row['agreement']:.1%}" for row in c["menu"]
    ]
    return "\n".join([head, *rows, f"  tokens kept exact in mid-text: {profile.exact_share:.2%}"])


def _name(change: dict[str, object]) -> str:
    return ", ".join(f"{k}={v}" for k, v in change.items()) or "starting recipe"
