"""Train a tiny Z-Image from scratch on captioned drawings, in the latents of the embedded Stable Diffusion's VAE.

    python -m examples.shapes.make_flow_model --output_dir output/shapes/flow_model_4000
    python -m examples.shapes.make_flow_model --start_from output/shapes/flow_model_4000 --learning_rate 2e-3 --steps 2500 --seed 1

The parts are Z-Image's own classes (arXiv 2511.22699): a Qwen3 text encoder behind a Qwen2 tokenizer with a chat template, and a
single-stream transformer that predicts the velocity of a rectified flow (arXiv 2209.03003); only narrower. Both learn together. Noise
levels are drawn logit-normal (arXiv 2403.03206), hidden matrices learn by Muon and the rest by AdamW. An exponential moving average of the
weights is what is saved, in half precision, as a diffusers folder without a VAE: name the embedded one beside it (`--vae
examples/shapes/model/vae`; in diffusers, `from_pretrained(..., vae=...)`).
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from examples.shapes.tokenizer import build_chat_tokenizer
from examples.shapes.train_diffusion import settings, train

VAE = Path(__file__).with_name("model") / "vae"
LOGIT_MEAN, LOGIT_STD = 0.5, 1.2  # of a noise level's logit: more noise than data, as what a picture shows is decided there
WIDTH, TEXT_WIDTH = 128, 96


class TextToVelocity(nn.Module):
    """Text encoder and transformer as one module, so that one optimizer and one moving average hold both."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__()
        self.text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=3,  # Z-Image reads what goes into the last one
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=TEXT_WIDTH // 4,
                max_position_embeddings=512,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=WIDTH,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[8, 12, 12],
        )
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and ("adaLN" in name or name.endswith("final_layer.2-1.linear")):
                nn.init.zeros_(module.weight)  # each block begins as the identity (arXiv 2212.09748)
                nn.init.zeros_(module.bias)

    def forward(self, latents: Tensor, sigmas: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Velocities, noise minus data, of noisy latents [B, 4, h, w] at sigmas [B] in 0..1; token ids and their mask [B, L]."""
        hidden = self.text_encoder(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        texts = [row[kept] for row, kept in zip(hidden, mask.bool(), strict=True)]
        predicted = self.transformer(list(latents[:, :, None]), 1 - sigmas, texts, return_dict=False)[0]
        return -torch.stack(predicted)[:, :, 0]


def chat(captions: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in captions]


def optimizers_of(model: TextToVelocity, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (2502.16982's scale, which takes AdamW's learning rate) for what stands between the ends, AdamW for the ends."""
    hidden, ends = [], []
    for name, parameter in model.named_parameters():
        inner = "layers" in name or "refiner" in name
        (hidden if inner and parameter.ndim == 2 and "adaLN" not in name else ends).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(ends, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def main() -> None:
    parser = settings(__doc__, learning_rate=3e-3, steps=4000)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/shapes/flow_model"))
    parser.add_argument("--start_from", type=Path, help="a folder that was written before: go on from its weights, with a new schedule")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_chat_tokenizer()
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval()

    model = TextToVelocity(tokenizer)
    if args.start_from:
        for name, part in model.named_children():
            part.load_state_dict(type(part).from_pretrained(args.start_from / name, dtype=torch.float32).state_dict())

    def loss_of(model: nn.Module, latents: Tensor, captions: list[str]) -> Tensor:
        chats = tokenizer.apply_chat_template(chat(captions), tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(chats, padding=True, return_tensors="pt")
        noise = torch.randn_like(latents)
        sigmas = (LOGIT_MEAN + LOGIT_STD * torch.randn(len(latents))).sigmoid()
        noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
        return (model(noisy, sigmas, tokens.input_ids, tokens.attention_mask) - (noise - latents)).square().mean()

    def save(model: nn.Module) -> None:
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=None,
            text_encoder=model.text_encoder,
            tokenizer=tokenizer,
            transformer=model.transformer,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(args.output_dir)

    train(model, optimizers_of(model, args.learning_rate), vae, args, loss_of, save)


if __name__ == "__main__":
    main()
