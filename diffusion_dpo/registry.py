"""The five tables of plug-ins: a short name to an import string. The only place where a registration line goes."""

import difflib
import importlib
import os
import sys

TABLES: dict[str, dict[str, str]] = {
    "data": {
        "auto": "diffusion_dpo.data.recognise:AutoData",
        "pairs": "diffusion_dpo.data.pairs:PairsData",
        "pickapic": "diffusion_dpo.data.pickapic:PickapicData",
        "folder": "diffusion_dpo.data.folder:FolderData",
        "hub": "diffusion_dpo.data.hub:HubData",
        "labelled": "diffusion_dpo.data.labelled:LabelledData",
        "hpdv3": "diffusion_dpo.data.hpdv3:HPDv3Data",
        "ranked": "diffusion_dpo.data.ranked:RankedData",
        "two_folders": "diffusion_dpo.data.two_folders:TwoFoldersData",
        "invoke": "diffusion_dpo.data.invoke:InvokeData",
    },
    "models": {
        "stable_diffusion": "diffusion_dpo.models.stable_diffusion:StableDiffusion",
        "stable_diffusion_xl": "diffusion_dpo.models.stable_diffusion_xl:StableDiffusionXL",
    },
    "losses": {
        "dpo": "diffusion_dpo.losses.dpo:DPO",
        "ipo": "diffusion_dpo.losses.ipo:IPO",
        "hinge": "diffusion_dpo.losses.hinge:Hinge",
        "robust_dpo": "diffusion_dpo.losses.robust_dpo:RobustDPO",
        "dmpo": "diffusion_dpo.losses.dmpo:DMPO",
        "dpo_shift": "diffusion_dpo.losses.dpo_shift:DPOShift",
        "linear_dpo": "diffusion_dpo.losses.linear_dpo:LinearDPO",
        "mapo": "diffusion_dpo.losses.mapo:MaPO",
        "kto": "diffusion_dpo.losses.kto:KTO",
        "sft": "diffusion_dpo.losses.sft:SFT",
        "dco": "diffusion_dpo.losses.dco:DCO",
        "capo": "diffusion_dpo.losses.capo:CaPO",
        "rank_dpo": "diffusion_dpo.losses.rank_dpo:RankDPO",
        "plackett_luce": "diffusion_dpo.losses.plackett_luce:PlackettLuce",
    },
    "strategies": {
        "best_worst": "diffusion_dpo.strategies.best_worst:BestWorst",
        "top_bottom": "diffusion_dpo.strategies.top_bottom:TopBottom",
        "all_pairs": "diffusion_dpo.strategies.all_pairs:AllPairs",
        "pareto": "diffusion_dpo.strategies.pareto:Pareto",
        "majority": "diffusion_dpo.strategies.majority:Majority",
        "weighted": "diffusion_dpo.strategies.weighted:Weighted",
        "gate": "diffusion_dpo.strategies.gate:Gate",
        "real_vs_generated": "diffusion_dpo.strategies.real_vs_generated:RealVsGenerated",
    },
    "scorers": {
        "aesthetic": "diffusion_dpo.scorers.aesthetic:Aesthetic",
        "arcface": "diffusion_dpo.scorers.arcface:ArcFace",
        "brightness": "diffusion_dpo.scorers.brightness:Brightness",
        "clip": "diffusion_dpo.scorers.clip:Clip",
        "clip_diversity": "diffusion_dpo.scorers.clip_diversity:ClipDiversity",
        "clip_image": "diffusion_dpo.scorers.clip_image:ClipImage",
        "colorfulness": "diffusion_dpo.scorers.colorfulness:Colorfulness",
        "dino": "diffusion_dpo.scorers.dino:Dino",
        "diversity": "diffusion_dpo.scorers.diversity:Diversity",
        "hps": "diffusion_dpo.scorers.hps:Hps",
        "http": "diffusion_dpo.scorers.http:Http",
        "judge": "diffusion_dpo.scorers.vlm_judge:VlmJudge",
        "lpips": "diffusion_dpo.scorers.lpips:Lpips",
        "pickscore": "diffusion_dpo.scorers.pickscore:PickScore",
        "pocket_scene": "diffusion_dpo.scorers.pocket_scene:PocketScene",
        "saturation": "diffusion_dpo.scorers.saturation:Saturation",
        "sface": "diffusion_dpo.scorers.sface:SFace",
        "sharpness": "diffusion_dpo.scorers.sharpness:Sharpness",
    },
}


def resolve(table: str, name: str) -> type:
    """Return the class that `name` stands for: a key of the table, or `my_package.my_module:MyClass` from outside.

    What is from outside may also lie in the working directory, which a console script does not have on its path.
    Raises ValueError, naming what is registered and the nearest name, when there is no such plug-in or it cannot be
    imported.
    """
    target = TABLES[table].get(name, name)
    module_name, separator, attribute = target.partition(":")
    if not separator:
        near = difflib.get_close_matches(name, TABLES[table], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(TABLES[table]))
        raise ValueError(f"unknown type {name!r}.{hint} Known: {known}; or your own as 'my_package.my_module:MyClass'")
    if target == name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, AttributeError, TypeError, NameError, ValueError, SystemExit) as error:
        raise ValueError(f"type {name!r} cannot be imported: {error}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise ValueError(f"type {name!r}: module {module_name!r} has no class {attribute!r}")
    return found
