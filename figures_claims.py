"""
The pictures of a study of claims, each from numbers that report_claims.py gives, as a Figure.
"""
import textwrap

import numpy as np

from figures import new_figure, panel_grid, plain

# of the verdicts; each has a marker of its own too, for what is printed without colours
VERDICTS = {"supported": ("#00796b", "o"), "refuted": ("#b2182b", "s"), "inconclusive": ("#777777", "D")}
FAR = 6 # effects of interest, where the forest ends: what lies further is an arrow there


def forest(entries):
    """
    The estimates of claims with their intervals and seeds, in effects of interest, a line each, over the band of no
    interest. entries: dicts of label, text (at the right), verdict, estimate, low, high (or None), and values.
    """
    fig, ax = new_figure(9.5, 1.3 + 0.42 * len(entries))
    ax.axvspan(-1, 1, color="0.93", lw=0, zorder=0)
    ax.axvline(0, color="0.5", lw=0.8, zorder=1)
    ax.axvline(1, color="0.5", lw=0.8, ls=":", zorder=1)
    drawn = [0, 1.2]
    for i, entry in enumerate(entries):
        colour, marker = VERDICTS[entry["verdict"]]
        values = np.clip(entry["values"], -FAR, FAR)
        ax.plot(values, np.full(len(values), i), "|", color=colour, alpha=0.4, ms=7, zorder=2)
        drawn += list(values)
        if entry["low"] is not None:
            low, high = np.clip([entry["low"], entry["high"]], -FAR, FAR)
            ax.plot([low, high], [i, i], color=colour, lw=2, zorder=3)
            drawn += [low, high]
        estimate = entry["estimate"]
        if abs(estimate) > FAR:
            marker = ">" if estimate > 0 else "<"
        ax.plot(np.clip(estimate, -FAR, FAR), i, marker, color=colour, mec="w", ms=9, zorder=4)
        ax.annotate(plain(entry["text"]), (1.01, i), xycoords=("axes fraction", "data"), fontsize=8, va="center",
                    color=colour, annotation_clip=False)
    margin = 0.05 * (max(drawn) - min(drawn))
    ax.set(xlim=(min(drawn) - margin, max(drawn) + margin), ylim=(len(entries) - 0.5, -0.5),
           xlabel="effect in the claim's direction, in effects of interest (0: none, 1: of interest; band: too small)")
    ax.set_yticks(range(len(entries)), [plain(entry["label"]) for entry in entries], fontsize=9)
    for name, (colour, marker) in VERDICTS.items():
        if any(entry["verdict"] == name for entry in entries):
            ax.plot([], [], marker, color=colour, label=name)
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return fig


def heads_by_settings(heads, settings, gains, texts, ranks):
    """
    A heat map of heads (H) by settings (S). gains (H, S): in effects of interest, positive is better, nan without;
    texts (H, S): what is written there; ranks (H): texts of the margin.
    """
    fig, ax = new_figure(2.6 + 1.6 * len(settings), 1.6 + 0.36 * len(heads))
    image = show(ax, gains, "RdBu", -3, 3)
    write(ax, texts, image)
    ax.set_xticks(range(len(settings)), [plain(textwrap.fill(name, 18)) for name in settings], fontsize=8)
    ax.set_yticks(range(len(heads)), [plain(head) for head in heads], fontsize=9)
    for i, rank in enumerate(ranks):
        ax.annotate(rank, (len(settings) - 0.4, i), fontsize=9, va="center", annotation_clip=False)
    ax.annotate("mean rank", (len(settings) - 0.4, -0.7), fontsize=8, color="0.35", annotation_clip=False)
    bar = fig.colorbar(image, ax=ax, location="bottom", shrink=0.9, aspect=30, extend="both")
    bar.set_label("better than the linear head, in effects of interest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return fig


def tuning(panels):
    """
    Heat maps of tuning. panels: dicts of title, rates (R), scales (S), scale (the name), values (R, S) with nan where
    nothing was tried and inf where a run failed, low and high (of the colours), chosen ((i, j) or None).
    """
    fig, axes = panel_grid(len(panels), 4, 3, 1.9)
    for ax, panel in zip(axes, panels):
        values = panel["values"]
        failed = np.isinf(values)
        image = show(ax, np.where(failed, np.nan, values), panel["colours"], panel["low"], panel["high"])
        texts = [["failed" if np.isinf(x) else f"{x:{panel['spec']}}" for x in row] for row in values]
        texts = np.where(np.isnan(values), "", texts)
        write(ax, texts, image, fontsize=6)
        ax.set_xticks(range(len(panel["scales"])), [f"{x:.3g}" for x in panel["scales"]], fontsize=7)
        ax.set_yticks(range(len(panel["rates"])), [f"{x:.2g}" for x in panel["rates"]], fontsize=7)
        ax.set_xlabel(plain(panel["scale"]), fontsize=8)
        ax.set_ylabel("learning rate", fontsize=8)
        ax.set_title(plain(panel["title"]), fontsize=8)
        if panel["chosen"]:
            i, j = panel["chosen"]
            ax.plot([j - 0.5, j + 0.5, j + 0.5, j - 0.5, j - 0.5], [i - 0.5, i - 0.5, i + 0.5, i + 0.5, i - 0.5],
                    color="#d55e00", lw=2.5, clip_on=False)
    return fig


def show(ax, values, colours, low=None, high=None):
    """
    The image of values (rows, columns), the first row on top and nan white, in colours between low and high, by default
    the least and the most of them.
    """
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto",
                      interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def write(ax, texts, image, fontsize=8):
    """Write texts (rows, columns) on an image, light where it is dark."""
    for (i, j), text in np.ndenumerate(np.asarray(texts)):
        value, is_dark = image.get_array()[i, j], False
        if not np.ma.is_masked(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        ax.annotate(plain(str(text)), (j, i), ha="center", va="center", fontsize=fontsize,
                    color="w" if is_dark else "k")
