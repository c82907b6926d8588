"""Steps of the benchmarks' tables about Core AI bundles; each is called in a process of its own."""

from pathlib import Path

QUESTIONS = 4


def float32_twin(checkpoint: str, target: str) -> dict[str, float]:
    """Write a bundle whose programs compute in float32, and hold it against PyTorch on a few demo questions.

    No engine loads such a bundle: it proves the graphs apart from float16's rounding.

    Returns:
        The least SNR in dB of a picture's image "embeddings", and of a prompt's "logits", each side on its own.
    """
    import fastvlm
    from benchmarks.metrics import snr_db
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.data import scenes
    from model_export.coreai import bundle
    from model_export.coreai.programs import Programs
    from model_export.coreai.runtime import load_bundle, projected

    opened, folder = open_checkpoint(checkpoint), Path(target)
    programs = Programs(opened, bundle.shape_of(opened), "float32")
    folder.mkdir(parents=True)
    programs.write_embedding(folder / bundle.ASSETS["embedding"])
    programs.write_decoder(folder / bundle.ASSETS["main"])
    programs.write_vision(folder / bundle.ASSETS["vision"], lambda: ())
    bundle.write_files(opened, programs.shape, folder)
    expected, twin = projected(fastvlm.load(checkpoint)), load_bundle(folder)
    worst = {"embeddings": float("inf"), "logits": float("inf")}
    for question in scenes.questions(QUESTIONS, seed=0, split="test"):
        embeddings = [model.encode_image(model.preprocess(question.image)) for model in (expected, twin)]
        logits = [
            model.language.logits(model.merge(question.question, [own]))
            for model, own in zip((expected, twin), embeddings)
        ]
        for stage, pair in (("embeddings", embeddings), ("logits", logits)):
            worst[stage] = min(worst[stage], snr_db(*pair))
    return worst
