import FastVLM
import MLX
import MLXLMCommon
import MLXVLM

private let longestAnswer = 240

@MainActor
final class Session {
    func start() async throws -> ModelContainer {
        MLX.GPU.set(cacheLimit: 20 << 20)
        return try await VLMModelFactory.shared.loadContainer(configuration: Viewer.folder)
    }

    func go(on tokens: [Int]) -> GenerateDisposition {
        if tokens.count >= longestAnswer { return .stop }
        return .more
    }
}
