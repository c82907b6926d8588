"""Changes of our app (viewer/): name -> (file, what is there, what is put there, what the app then differs in).

A difference is a fact ("layers …o_proj"), which is judged by its new value, or after an exclamation mark a declaration
that is to be checked by hand.
"""

DECODER, SETTINGS, VIEWING = (f"FastVLM/{name}.swift" for name in ("Decoder", "Settings", "Viewing"))
SESSION, ENTITLEMENTS = "Viewer/Session.swift", "Viewer/Viewer.entitlements"
PROJECT = "Viewer.xcodeproj/project.pbxproj"
RESOLVED = "Viewer.xcodeproj/project.xcworkspace/xcshareddata/swiftpm/Package.resolved"

LOOKING, THINKING, SPEAKER = "!Looking.init(text:)", "!Thinking.init(from:to:)", "!Speaker.init(text:)"
WRITE, FEATURES, FOLDER = "!Writer.write(_:grid:)", "!Seeing.features(of:height:width:)", "!Viewer.folder"
CURVE = "let curve = GELU()"
DEPLOYMENT = [f"deployment {system}" for system in ("iOS", "macOS", "visionOS")]
HEAD = "_head.wrappedValue = Linear(text.channels, text.words, bias: false)"

CHANGES = {
    # written differently, but the same
    "comments": (DECODER, "let wide", "// let wide = 3\n        let wide /* ! */", []),
    "spaces": (DECODER, "Linear(text.channels, wide)", "Linear(\n  text.channels ,\n  wide\n)", []),
    "access": (SETTINGS, "private let givenTied", "public let givenTied", []),
    "a platform's version": (SESSION, "if tokens", "if #available(iOS 18.2, *) { print(1) }\n        if tokens", []),
    "a function more": (DECODER, CURVE, f"{CURVE}\n    func width() -> Int {{ 3 }}", []),
    "an escaped string": (VIEWING, '"<image>"', '"\\u{3C}image>"', []),
    "most tokens elsewhere": (
        SESSION,
        "if tokens.count >= longestAnswer { return .stop }",
        "_ = GenerateParameters(maxTokens: longestAnswer)",
        [],
    ),
    "a newer system for the app alone": (
        PROJECT,
        "MACOSX_DEPLOYMENT_TARGET = 15.2",
        "MACOSX_DEPLOYMENT_TARGET = 26",
        [],
    ),
    "another root": (PROJECT, '"$(SRCROOT)/', '"${PROJECT_DIR}/', []),
    # modules
    "a layer's key": (DECODER, '"q_proj"', '"query"', ["layers …self_attn.q_proj", "layers …self_attn.query"]),
    "a bias": (DECODER, "text.channels, bias: false)", "text.channels)", [LOOKING]),
    "a shape": (DECODER, "Linear(inner, outer,", "Linear(inner * 2, outer + 1,", [THINKING]),
    "a head that is always there": (DECODER, "if text.tied {", f"{HEAD}; if false {{", [SPEAKER]),
    "fewer layers": (DECODER, "0 ..< text.depth", "1 ..< text.depth", ["!Stack.init(text:)"]),
    "a key without a name": (DECODER, '(key: "q_proj")', "(key: name)", ["!Looking.queries"]),
    "a weight of its own": (DECODER, CURVE, "let scale: MLXArray", ["!Bridge.curve", "!Bridge.scale"]),
    "a module in an extension": (
        VIEWING,
        "final class Viewer",
        "extension Bridge { var more: Linear = Linear(1, 1) }\nfinal class Viewer",
        ["!Bridge.more"],
    ),
    "an initializer more": (DECODER, CURVE, f"{CURVE}\n    init() {{}}", ["!Bridge.init()"]),
    "one of two by #if": (
        DECODER,
        CURVE,
        f"#if DEBUG\n    {CURVE}\n#else\n    let curve = SiLU()\n#endif",
        ["!Bridge.curve"],
    ),
    "a half file": (DECODER, "text.keyHeads * width\n", "(text.keyHeads *\n", [LOOKING]),
    "renamed weights": (VIEWING, "{ weights }", "{ weights.mapKeys(f) }", ["!Viewer.sanitize(weights:)"]),
    "a type less": (DECODER, "final class Step", "final class Stage", ["!Step"]),
    # keys
    "a key": (
        SETTINGS,
        '"intermediate_size"',
        '"inner_size"',
        ["config inner_size", "config intermediate_size", *(f"layers …mlp.{n}_proj" for n in ("down", "gate", "up"))],
    ),
    "a key that may be absent": (SETTINGS, "let inner: Int", "let inner: Int?", ["config intermediate_size"]),
    "a key that may not": (
        SETTINGS,
        "let givenTied: Bool?",
        "let givenTied: Bool",
        ["config tie_word_embeddings", "!Settings.Text.tied"],
    ),
    "two keys for one": (SETTINGS, 'words = "vocab_size"', 'words = "words"', ["!Settings.Text.words"]),
    "a default": (SETTINGS, "givenTied ?? true", "givenTied ?? false", ["config tie_word_embeddings"]),
    "a dictionary's default": (SETTINGS, "[2, 1, 1]", "[16, 24, 24]", ["!Settings.Text.turns"]),
    "a type": (SETTINGS, "let image_token_index: Int", "let image_token_index: String", ["config image_token_index"]),
    "a nested key": (
        SETTINGS,
        '"shortest_edge"',
        '"edge"',
        ["preprocessor size.edge", "preprocessor size.shortest_edge"],
    ),
    "a struct that may be absent": (SETTINGS, "let crop: Crop", "let crop: Crop?", ["!Scaling.crop"]),
    "decoded by hand": (SETTINGS, "try Text(from: decoder)", "try box.decode(Text.self)", ["!Settings.init(from:)"]),
    "another strategy": (
        VIEWING,
        "return Viewer(",
        "x.keyDecodingStrategy = y; return Viewer(",
        ["!decoding_strategy"],
    ),
    "another struct": (VIEWING, "decode(Settings.self", "decode(Scaling.self", ["!model_configuration"]),
    # Core ML
    "the class": (VIEWING, "fastvithd", "encoder", ["model_class"]),
    "a class of the app's own": (
        VIEWING,
        "final class Seeing",
        "class fastvithd {}\nfinal class Seeing",
        ["!fastvithd"],
    ),
    "the input": (VIEWING, "images: input", "pixels: input", ["input_name"]),
    "the input's shape": (VIEWING, "[1, 3, height, width]", "[1, 3, 512, 512]", ["input_shape"]),
    "a computed shape": (
        VIEWING,
        "[1, 3, height, width]",
        "[1, 3, NSNumber(value: 512), width]",
        ["!input_shape", FEATURES],
    ),
    "the input's type": (VIEWING, "dataType: .float32)", "dataType: .float16)", ["input_dtype"]),
    "the output": (VIEWING, "answer.image_features", "answer.rows", ["output_name"]),
    "two outputs": (VIEWING, "answer.image_features.dataType", "answer.mask.dataType", ["!output_name", FEATURES]),
    "the output's tokens": (VIEWING, "[1, 256, 3072]", "[1, 64, 3072]", ["output_shape"]),
    "any number of tokens": (VIEWING, "[1, 256, 3072]", "[1, count, 3072]", ["output_shape"]),
    "a constant": (VIEWING, "[1, 256, 3072]", "[1, longestAnswer, 3072]", ["output_shape"]),
    "two shapes": (VIEWING, "MLXArray(answer", "MLXArray([1, 64, 3072], answer", ["!output_shape", FEATURES]),
    "no check of the output": (VIEWING, "image_features.shape ==", "image_features.shape >=", [FEATURES]),
    "the output's type": (
        VIEWING,
        "dataType == .float32",
        "dataType == MLMultiArrayDataType.float16",
        ["output_dtype"],
    ),
    # registries and prompt
    "the model type": (VIEWING, '"llava_qwen2"', '"fast_vlm"', ["model_type"]),
    "two models": (
        VIEWING,
        "factory.processorR",
        'x.registerModelType("y")\n        factory.processorR',
        ["model_type", "!model_type"],
    ),
    "the processor": (VIEWING, '"LlavaProcessor"', '"FastVlmProcessor"', ["processor_class"]),
    "the image token": (VIEWING, '"<image>"', '"<|image_pad|>"', ["image_token"]),
    "the patch": (VIEWING, "patchSize = 64", "patchSize = 32", ["patch_size"]),
    "a patch of nothing": (VIEWING, "patchSize = 64", "patchSize = 0", ["!patch_size", "!Picturing.patchSize"]),
    "a patch that is given": (VIEWING, "= Picturing()", "= Picturing(patchSize: 16)", ["!Writer.picturing"]),
    "more image tokens": (VIEWING, "ImageTokens = 0", "ImageTokens = 2", ["additional_image_tokens"]),
    "no count": (VIEWING, "(grid.h / side) *", "(grid.h / side) +", [WRITE, "!Writer.image_tokens"]),
    "the system prompt": (VIEWING, "You are a helpful assistant.", "Describe.", ["system_prompt"]),
    "the turn": (VIEWING, "<|im_start|>\\(", "<|turn|>\\(", ["turn"]),
    "another role": (VIEWING, 'default: "user"', 'default: "human"', [WRITE]),
    "the separator": (VIEWING, 'separator: "\\n"', 'separator: ""', ["turn_separator"]),
    "the end": (VIEWING, "assistant\\n", "assistant", ["prompt_end"]),
    # the bundle and a session
    "the resource": (VIEWING, '"config"', '"model"', ["bundle_resource"]),
    "the bundle": (
        VIEWING,
        "Bundle(for: Viewer.self)",
        "Bundle.main",
        ["model_folder", *DEPLOYMENT, "!bundle_class", FOLDER],
    ),
    "the cache": (SESSION, "20 << 20", "2 * 1024 * 1024", ["cache_limit"]),
    "the cache, set anew": (
        SESSION,
        "MLX.GPU.set(cacheLimit: 20 << 20)",
        "MLX.Memory.cacheLimit = 1",
        ["cache_limit", "api"],
    ),
    "the answer": (SESSION, "longestAnswer = 240", "longestAnswer = 0x80", ["max_tokens"]),
    "two ends": (SESSION, "private let", "let longestAnswer = 120\nprivate let", ["!max_tokens"]),
    "an interface": (VIEWING, "imageGridThw:", "frames:", ["api"]),
    # the project
    "no entitlement": (ENTITLEMENTS, "<true/>", "<false/>", ["increased_memory_limit"]),
    "no entitlements": (PROJECT, "CODE_SIGN_ENTITLEMENTS", "CODE_SIGN_STYLE", ["increased_memory_limit"]),
    "one configuration's deployment": (
        PROJECT,
        "IPHONEOS_DEPLOYMENT_TARGET = 18.1",
        "IPHONEOS_DEPLOYMENT_TARGET = 9.3",
        ["deployment iOS"],
    ),
    "the project's deployment": (
        PROJECT,
        "XROS_DEPLOYMENT_TARGET = 2.2",
        "XROS_DEPLOYMENT_TARGET = 1.3",
        ["deployment visionOS"],
    ),
    "the deployment of the target with the model": (
        PROJECT,
        "MACOSX_DEPLOYMENT_TARGET = 15.0",
        "MACOSX_DEPLOYMENT_TARGET = 13.0",
        ["deployment macOS"],
    ),
    "a platform less": (PROJECT, '"iphoneos macosx xros"', "iphoneos", ["deployment macOS", "deployment visionOS"]),
    "a package's version": (PROJECT, "minimumVersion = 0.21.2", "minimumVersion = 0.29.1", ["packages mlx-swift"]),
    "a package's rule": (
        PROJECT,
        "{kind = upToNextMajorVersion; minimumVersion = 0.1.18; }",
        "{kind = versionRange; minimumVersion = 0.1.18; maximumVersion = 0.1.20; }",
        ["packages swift-transformers"],
    ),
    "a package less": (
        PROJECT,
        "AA0000000000000000000032, );\n\t\t\ttargets",
        ");\n\t\t\ttargets",
        ["packages swift-transformers"],
    ),
}

# what can't be read in the project: (file, what is there, what is put there, what the refusal names)
REFUSED = {
    "a setting by platform": (
        PROJECT,
        "MACOSX_DEPLOYMENT_TARGET = 15.2",
        '"MACOSX_DEPLOYMENT_TARGET[sdk=macosx*]" = 15.2',
        "MACOSX_DEPLOYMENT_TARGET",
    ),
    "a setting by name": (
        PROJECT,
        "MACOSX_DEPLOYMENT_TARGET = 15.2",
        'MACOSX_DEPLOYMENT_TARGET = "$(RECOMMENDED)"',
        "deployment target",
    ),
    "a requirement of another kind": (
        PROJECT,
        "kind = upToNextMajorVersion; minimumVersion = 0.21.2",
        "kind = latest",
        "packages",
    ),
    "a file of the model left out": (
        PROJECT,
        "AA0000000000000000000021 = {",
        "AA0000000000000000000050 = {isa = PBXFileSystemSynchronizedBuildFileExceptionSet; membershipExceptions = "
        "(model/config.json, ); target = AA0000000000000000000002; };\n\t\tAA0000000000000000000021 = "
        "{exceptions = (AA0000000000000000000050, ); ",
        "membershipExceptions: got model/config.json",
    ),
    "no application": (PROJECT, "product-type.application", "product-type.tool", "got 0 targets"),
    "no folders": (PROJECT, "fileSystemSynchronizedGroups", "files", "Swift files"),
}
